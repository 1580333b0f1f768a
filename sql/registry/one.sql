SELECT table_schema, table_name, column_name, provider, model, dimensions, recipe,
       expected_expression, environment, pending_since, written_at, evaluated_at, created_at,
       updated_at
FROM embedding_pipeline.embedding_column
WHERE table_schema = $1 AND table_name = $2 AND column_name = $3
