-- An autovacuum worker makes way for whoever waits longer than this, 1 s by default. We never wait
-- so long: on a table where one works for hours, no ALTER would get through. Superusers only.
SELECT set_config('deadlock_timeout', {milliseconds}, true)
FROM pg_roles WHERE rolname = current_user AND rolsuper
