-- An incident that nobody was told of has passed by itself.
DELETE FROM embedding_pipeline.incident WHERE id = $1
