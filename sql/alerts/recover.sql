-- An incident is over.
UPDATE embedding_pipeline.incident SET recovered_at = now() WHERE id = $1
