INSERT INTO embedding_pipeline.pause AS known
    (table_schema, table_name, column_name, paused_by, reason)
VALUES ($1, $2, $3, $4, $5)
ON CONFLICT (table_schema, table_name, column_name) DO UPDATE SET
    reason = coalesce(excluded.reason, known.reason)
RETURNING column_name, paused_by, reason, paused_at, xmax = 0
