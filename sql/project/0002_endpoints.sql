-- Version 2: a row that was retried keeps its history; what all processes share of an endpoint.
ALTER TABLE embedding_pipeline.quarantined_row ADD COLUMN released_at timestamptz;
COMMENT ON COLUMN embedding_pipeline.quarantined_row.released_at IS
    'since when the row may be tried again; NULL while it is left out';

-- Limits hold for an endpoint, whoever asks it. Requests take their turns on one timeline, which
-- is reserved up to free_at; requests in flight take places, which holders renew.
CREATE TABLE embedding_pipeline.endpoint_budget (
    endpoint text NOT NULL,
    address_hash text NOT NULL,
    free_at timestamptz NOT NULL DEFAULT '-infinity',
    requests_per_minute integer,
    tokens_per_minute integer,
    learnt_at timestamptz,
    holders jsonb NOT NULL DEFAULT '{}',
    version bigint NOT NULL DEFAULT 0,
    used_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (endpoint, address_hash)
) WITH (fillfactor = 50);

-- Which endpoint answers a table's queries, as the processes that ask have found.
CREATE TABLE embedding_pipeline.endpoint_state (
    table_schema text NOT NULL,
    table_name text NOT NULL,
    mode text NOT NULL,
    active text NOT NULL,
    model text NOT NULL,
    column_name text NOT NULL,
    fell_back boolean NOT NULL,
    since timestamptz NOT NULL,
    last_error text,
    last_error_at timestamptz,
    latency_ms double precision,
    process text NOT NULL,
    updated_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (table_schema, table_name)
);

INSERT INTO embedding_pipeline.schema_version (version) VALUES (2)
