-- What search uses: approximate nearest neighbours by cosine distance.
CREATE INDEX {concurrently}{name} ON {only}{table} USING hnsw ({vector} {operator_class})
