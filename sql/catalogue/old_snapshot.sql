-- A session whose transaction has been open for more than $1 seconds: CONCURRENTLY waits for it.
SELECT pid, coalesce(state, 'unknown') FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_xmin IS NOT NULL
  AND backend_type = 'client backend'
  AND xact_start < clock_timestamp() - make_interval(secs => $1::float8)
ORDER BY xact_start LIMIT 1
