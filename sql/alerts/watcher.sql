-- When the alert sensor last ticked, up to when it has seen runs, and which channels it has.
SELECT ticked_at, extract(epoch FROM now() - ticked_at)::float8, runs_until, channels
FROM embedding_pipeline.alert_sensor WHERE environment = $1
