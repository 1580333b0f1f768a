-- Version 4: incidents, the messages about them, and when the alert sensor last ticked.
CREATE TABLE embedding_pipeline.incident (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    environment text NOT NULL,
    kind text NOT NULL,
    subject text NOT NULL,
    table_name text,
    column_name text,
    details jsonb NOT NULL,
    first_seen timestamptz NOT NULL DEFAULT now(),
    last_seen timestamptz NOT NULL DEFAULT now(),
    sightings integer NOT NULL DEFAULT 1,
    needed integer NOT NULL,
    unseen integer NOT NULL DEFAULT 0,
    notified_at timestamptz,
    recovered_at timestamptz
);
COMMENT ON COLUMN embedding_pipeline.incident.needed IS
    'ticks running in which it is seen before somebody is told, and unseen before it is over';
CREATE UNIQUE INDEX incident_open ON embedding_pipeline.incident (environment, kind, subject)
    WHERE recovered_at IS NULL;
CREATE INDEX incident_recovered ON embedding_pipeline.incident (environment, recovered_at)
    WHERE recovered_at IS NOT NULL;

-- What is to be sent to each channel, written with the incident in one transaction: what was not
-- delivered when a process died is still here.
CREATE TABLE embedding_pipeline.alert_message (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    incident_id bigint NOT NULL REFERENCES embedding_pipeline.incident ON DELETE CASCADE,
    event text NOT NULL CHECK (event IN ('alert', 'recovery')),
    channel text NOT NULL,
    title text NOT NULL,
    body text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    attempts integer NOT NULL DEFAULT 0,
    not_before timestamptz NOT NULL DEFAULT now(),
    delivered_at timestamptz,
    given_up_at timestamptz,
    last_error text,
    UNIQUE (incident_id, event, channel)
);
CREATE INDEX alert_message_waiting ON embedding_pipeline.alert_message (channel, id)
    WHERE delivered_at IS NULL AND given_up_at IS NULL;

-- One row an environment. Who watches the watcher: `status` says when it last ticked.
CREATE TABLE embedding_pipeline.alert_sensor (
    environment text PRIMARY KEY,
    ticked_at timestamptz NOT NULL DEFAULT now(),
    runs_until timestamptz NOT NULL,
    channels text[] NOT NULL DEFAULT '{}'
);

INSERT INTO embedding_pipeline.schema_version (version) VALUES (4)
