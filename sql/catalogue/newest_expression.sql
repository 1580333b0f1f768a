-- The first key of the newest index on $1, as Postgres writes it.
SELECT pg_get_indexdef(indexrelid, 1, true) FROM pg_index
WHERE indrelid = $1::regclass ORDER BY indexrelid DESC LIMIT 1
