-- pgvector's types and index methods. Run only where the extension is missing; an existing one
-- stays in whatever schema it is in.
CREATE EXTENSION vector WITH SCHEMA {schema}
