-- Documentation chunks of the worked example.
CREATE TABLE bora_docs (
    id           bigint PRIMARY KEY,
    source       text NOT NULL,
    section      text NOT NULL,
    content      text NOT NULL,
    published_at timestamptz NOT NULL
);
