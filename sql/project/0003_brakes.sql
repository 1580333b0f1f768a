-- Version 3: brakes, and since when what is pending has been pending.
-- Somebody wants this table, or one column of it, left alone.
CREATE TABLE embedding_pipeline.pause (
    table_schema text NOT NULL,
    table_name text NOT NULL,
    column_name text NOT NULL,
    paused_by text NOT NULL,
    reason text,
    paused_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (table_schema, table_name, column_name)
);
COMMENT ON COLUMN embedding_pipeline.pause.column_name IS 'empty: every column of the table';

-- What each day has cost, for a provider and for all of them ('*'): what runs have spent, and
-- while they run the most that their requests in flight can come to.
CREATE TABLE embedding_pipeline.daily_spending (
    day date NOT NULL,
    provider text NOT NULL,
    usd double precision NOT NULL,
    stopped_cap_usd double precision,
    stopped_at timestamptz,
    PRIMARY KEY (day, provider)
) WITH (fillfactor = 50);
COMMENT ON COLUMN embedding_pipeline.daily_spending.day IS 'in the schedule''s time zone';
COMMENT ON COLUMN embedding_pipeline.daily_spending.stopped_cap_usd IS
    'the cap at which a run stopped, because its next request might have passed it';

ALTER TABLE embedding_pipeline.lease ADD COLUMN emptied_at timestamptz;
COMMENT ON COLUMN embedding_pipeline.lease.emptied_at IS
    'whatever was pending in this partition at that time has been embedded since';

INSERT INTO embedding_pipeline.schema_version (version) VALUES (3)
