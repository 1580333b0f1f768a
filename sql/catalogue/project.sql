SELECT to_regnamespace('embedding_pipeline') IS NOT NULL,
       to_regclass('embedding_pipeline.schema_version') IS NOT NULL
