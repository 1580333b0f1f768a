-- What the role that runs the pipeline needs where it does not own the table.
GRANT SELECT, UPDATE ON {table} TO {role};
GRANT USAGE ON SCHEMA embedding_pipeline TO {role};
GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA embedding_pipeline TO {role}
