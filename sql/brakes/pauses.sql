SELECT column_name, paused_by, reason, paused_at
FROM embedding_pipeline.pause
WHERE table_schema = $1 AND table_name = $2
ORDER BY column_name
