-- Whether an index of a table is being built at this moment.
SELECT EXISTS (SELECT FROM pg_stat_progress_create_index WHERE relid = $1::oid)
