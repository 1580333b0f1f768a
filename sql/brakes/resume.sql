DELETE FROM embedding_pipeline.pause
WHERE table_schema = $1 AND table_name = $2 AND ($3 = '' OR column_name = $3)
RETURNING column_name, paused_by, reason, paused_at
