-- Version 5: nights, which are opened by the schedule and closed once a table's checks are asked
-- for; what happens in between may take several runs.
CREATE TABLE embedding_pipeline.night (
    environment text NOT NULL,
    asset_name text NOT NULL,
    scheduled_at timestamptz NOT NULL,
    opened_at timestamptz NOT NULL DEFAULT now(),
    closed_at timestamptz,
    outcome text,
    PRIMARY KEY (environment, asset_name, scheduled_at)
);
COMMENT ON COLUMN embedding_pipeline.night.outcome IS 'how it ended, in words';

INSERT INTO embedding_pipeline.schema_version (version) VALUES (5)
