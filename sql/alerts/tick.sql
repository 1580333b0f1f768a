-- The alert sensor has ticked.
INSERT INTO embedding_pipeline.alert_sensor (environment, runs_until, channels)
VALUES ($1, $2, $3)
ON CONFLICT (environment) DO UPDATE
SET ticked_at = now(), runs_until = excluded.runs_until, channels = excluded.channels
