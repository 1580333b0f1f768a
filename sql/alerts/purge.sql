-- Old incidents and their messages.
DELETE FROM embedding_pipeline.incident
WHERE environment = $1 AND recovered_at < now() - make_interval(days => $2)
