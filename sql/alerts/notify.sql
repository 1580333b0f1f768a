-- From now on somebody is told of an incident.
UPDATE embedding_pipeline.incident SET notified_at = now() WHERE id = $1
RETURNING first_seen
