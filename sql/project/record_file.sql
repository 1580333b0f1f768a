INSERT INTO embedding_pipeline.applied_file (name, sha256) VALUES ({name}, {sha256})
