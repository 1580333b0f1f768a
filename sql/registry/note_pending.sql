-- Since when a column has been pending without a break, after noting whether it is; written only
-- when that changes.
WITH noted AS (
    UPDATE embedding_pipeline.embedding_column
    SET pending_since = CASE WHEN $4 THEN now() END
    WHERE table_schema = $1 AND table_name = $2 AND column_name = $3
        AND (pending_since IS NOT NULL) <> $4
    RETURNING pending_since
)
SELECT pending_since FROM noted
UNION ALL
SELECT pending_since FROM embedding_pipeline.embedding_column
WHERE table_schema = $1 AND table_name = $2 AND column_name = $3
    AND NOT EXISTS (SELECT FROM noted)
