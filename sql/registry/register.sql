INSERT INTO embedding_pipeline.embedding_column
    (table_schema, table_name, column_name, provider, model, dimensions, recipe,
     expected_expression, environment)
VALUES ({table_schema}, {table_name}, {column_name}, {provider}, {model}, {dimensions}, {recipe},
        {expected_expression}, {environment})
ON CONFLICT (table_schema, table_name, column_name) DO UPDATE SET
    provider = excluded.provider,
    model = excluded.model,
    dimensions = excluded.dimensions,
    recipe = excluded.recipe,
    expected_expression = excluded.expected_expression,
    environment = excluded.environment,
    updated_at = now()
