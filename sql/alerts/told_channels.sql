-- Channels that an incident's alert was written for.
SELECT channel FROM embedding_pipeline.alert_message
WHERE incident_id = $1 AND event = 'alert' ORDER BY id
