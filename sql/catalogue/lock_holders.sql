-- Other sessions that hold or await a lock on a table or its partitions, oldest transaction first.
-- $1: the table's oid.
SELECT DISTINCT ON (a.xact_start, l.pid)
    l.pid, l.mode, l.granted, a.usename, a.application_name, a.state,
    extract(epoch FROM clock_timestamp() - a.xact_start)::float8 AS seconds, a.query
FROM pg_locks l
LEFT JOIN pg_stat_activity a ON a.pid = l.pid
WHERE l.locktype = 'relation'
  AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
  AND (l.relation = $1::bigint::oid
       OR l.relation IN (SELECT relid FROM pg_partition_tree($1::bigint::oid::regclass)))
  AND l.pid IS DISTINCT FROM pg_backend_pid() AND l.granted
ORDER BY a.xact_start, l.pid
