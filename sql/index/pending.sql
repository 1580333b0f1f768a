-- The work queue: a partial index that holds the pending rows and no others.
CREATE INDEX {concurrently}{name} ON {only}{table} ({partition}, {keys}) WHERE {pending}
