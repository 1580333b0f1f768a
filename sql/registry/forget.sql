-- What the project knows of a column whose vectors are gone. Results of runs and evaluations stay.
DELETE FROM embedding_pipeline.quarantined_row
WHERE table_schema = {table_schema} AND table_name = {table_name} AND column_name = {column_name};
DELETE FROM embedding_pipeline.embedding_column
WHERE table_schema = {table_schema} AND table_name = {table_name} AND column_name = {column_name}
