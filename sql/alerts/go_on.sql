-- Columns whose provider answers again need not sit out their back-off.
UPDATE embedding_pipeline.lease SET not_before = NULL
WHERE released_at IS NOT NULL AND not_before > now()
    AND (table_name || '.' || column_name = ANY($1::text[])
        OR table_schema || '.' || table_name || '.' || column_name = ANY($1::text[]))
