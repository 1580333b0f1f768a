-- What the session $1 does while it builds, drops or rebuilds an index, and who is in its way.
SELECT p.phase,
       CASE WHEN p.tuples_total > 0 THEN p.tuples_done ELSE p.blocks_done END AS done,
       CASE WHEN p.tuples_total > 0 THEN p.tuples_total ELSE p.blocks_total END AS total,
       b.pid, b.usename, b.application_name, b.state, b.query
FROM (SELECT $1::int AS pid) AS me
LEFT JOIN pg_stat_progress_create_index p ON p.pid = me.pid
LEFT JOIN pg_stat_activity b ON b.pid = coalesce(
    (pg_blocking_pids(me.pid))[1], nullif(p.current_locker_pid, 0))
