-- A message for each channel.
INSERT INTO embedding_pipeline.alert_message (incident_id, event, channel, title, body)
SELECT $1, $2, channel, $4, $5 FROM unnest($3::text[]) AS channel
ON CONFLICT (incident_id, event, channel) DO NOTHING
