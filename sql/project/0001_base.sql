-- Version 1 of the project's own tables. A version, once released, is never edited: the next
-- change is the next file.
CREATE TABLE embedding_pipeline.schema_version (
    version integer PRIMARY KEY,
    applied_at timestamptz NOT NULL DEFAULT now()
);

-- Identity: which recipe fills a column, and which environment may write it.
CREATE TABLE embedding_pipeline.embedding_column (
    table_schema text NOT NULL,
    table_name text NOT NULL,
    column_name text NOT NULL,
    provider text NOT NULL,
    model text NOT NULL,
    dimensions integer NOT NULL,
    recipe text NOT NULL,
    expected_expression text NOT NULL,
    environment text NOT NULL,
    pending_since timestamptz,
    written_at timestamptz,
    evaluated_at timestamptz,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (table_schema, table_name, column_name)
);

-- Rows that the provider refused for good. The fingerprint is part of the key: when the text
-- changes, the exception no longer applies.
CREATE TABLE embedding_pipeline.quarantined_row (
    table_schema text NOT NULL,
    table_name text NOT NULL,
    column_name text NOT NULL,
    key jsonb NOT NULL,
    fingerprint uuid NOT NULL,
    error text NOT NULL,
    attempts integer NOT NULL DEFAULT 1,
    first_at timestamptz NOT NULL DEFAULT now(),
    last_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (table_schema, table_name, column_name, key, fingerprint)
);

-- Who is filling which partition, kept alive by a heartbeat.
CREATE TABLE embedding_pipeline.lease (
    table_schema text NOT NULL,
    table_name text NOT NULL,
    column_name text NOT NULL,
    partition_key text NOT NULL,
    run_id text,
    holder text NOT NULL,
    acquired_at timestamptz NOT NULL DEFAULT now(),
    heartbeat_at timestamptz NOT NULL DEFAULT now(),
    released_at timestamptz,
    failures integer NOT NULL DEFAULT 0,
    not_before timestamptz,
    last_error text,
    PRIMARY KEY (table_schema, table_name, column_name, partition_key)
);

-- What each run did and what it cost.
CREATE TABLE embedding_pipeline.run_result (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    table_schema text NOT NULL,
    table_name text NOT NULL,
    column_name text NOT NULL,
    run_id text,
    started_at timestamptz NOT NULL,
    finished_at timestamptz,
    partitions integer NOT NULL DEFAULT 0,
    embedded bigint NOT NULL DEFAULT 0,
    reused bigint NOT NULL DEFAULT 0,
    superseded bigint NOT NULL DEFAULT 0,
    locked bigint NOT NULL DEFAULT 0,
    quarantined bigint NOT NULL DEFAULT 0,
    cleared bigint NOT NULL DEFAULT 0,
    tokens bigint NOT NULL DEFAULT 0,
    requests bigint NOT NULL DEFAULT 0,
    throttled bigint NOT NULL DEFAULT 0,
    cost_usd double precision,
    forecast_usd double precision,
    provider text NOT NULL,
    model text NOT NULL
);
CREATE INDEX run_result_by_column ON embedding_pipeline.run_result
    (table_schema, table_name, column_name, started_at);

-- Retrieval quality over time.
CREATE TABLE embedding_pipeline.golden_set_result (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    table_schema text NOT NULL,
    table_name text NOT NULL,
    column_name text NOT NULL,
    model text NOT NULL,
    evaluated_at timestamptz NOT NULL DEFAULT now(),
    run_id text,
    queries integer NOT NULL,
    missing_expected integer NOT NULL DEFAULT 0,
    mrr_at_5 double precision,
    hit_at_1 double precision,
    ndcg_at_10 double precision,
    p50_ms double precision,
    p95_ms double precision,
    index_mrr_at_5 double precision,
    index_recall double precision,
    index_p50_ms double precision,
    index_p95_ms double precision,
    coverage double precision,
    details jsonb
);
CREATE INDEX golden_set_result_by_column ON embedding_pipeline.golden_set_result
    (table_schema, table_name, column_name, evaluated_at);

-- Golden-set queries already embedded, so that evaluating again costs nothing.
CREATE TABLE embedding_pipeline.query_vector (
    recipe text NOT NULL,
    query_hash uuid NOT NULL,
    vector real[] NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (recipe, query_hash)
);

-- The user's own SQL files that `migrate --file` has applied.
CREATE TABLE embedding_pipeline.applied_file (
    name text PRIMARY KEY,
    sha256 text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now()
);

INSERT INTO embedding_pipeline.schema_version (version) VALUES (1)
