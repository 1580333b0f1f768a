-- For the index of a partitioned table, which Postgres cannot drop CONCURRENTLY.
DROP INDEX {index}
