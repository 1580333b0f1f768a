-- Rows that runs have written to a table since it was last vacuumed, by us or by autovacuum.
SELECT coalesce(sum(embedded + reused + cleared), 0)::bigint
FROM embedding_pipeline.run_result
WHERE table_schema = $1 AND table_name = $2 AND finished_at > coalesce(
    (SELECT max(greatest(s.last_vacuum, s.last_autovacuum)) FROM pg_stat_all_tables s
     WHERE s.relid = $3::oid
        OR s.relid IN (SELECT relid FROM pg_partition_tree($3::oid::regclass))),
    '-infinity')
