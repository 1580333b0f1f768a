-- A message has arrived.
UPDATE embedding_pipeline.alert_message
SET delivered_at = now(), attempts = attempts + 1, last_error = NULL WHERE id = $1
