-- Where this project keeps its own books; nothing of the user's lives in it.
CREATE SCHEMA embedding_pipeline
