-- Version 6: the rate to which throttles have shown an endpoint to be limited, found by all processes
-- together.
ALTER TABLE embedding_pipeline.endpoint_budget ADD COLUMN found_rate jsonb;
ALTER TABLE embedding_pipeline.endpoint_budget ADD COLUMN found_version bigint NOT NULL DEFAULT 0;
COMMENT ON COLUMN embedding_pipeline.endpoint_budget.found_rate IS
    'requests a second, and how it came about; changed only from the version that was read';

INSERT INTO embedding_pipeline.schema_version (version) VALUES (6)
