-- For `reuse: true`: finds a vector that an equal text already has.
CREATE INDEX {concurrently}{name} ON {only}{table} ({fingerprint})
