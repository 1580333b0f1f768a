-- An incident is seen: opened, or the open one brought up to date.
INSERT INTO embedding_pipeline.incident AS i
    (environment, kind, subject, table_name, column_name, details, needed, first_seen)
VALUES ($1, $2, $3, $4, $5, $6, $7, coalesce(least($8::timestamptz, now()), now()))
ON CONFLICT (environment, kind, subject) WHERE recovered_at IS NULL
DO UPDATE SET details = excluded.details, last_seen = now(), sightings = i.sightings + 1,
    unseen = 0, needed = least(i.needed, excluded.needed)
RETURNING id, sightings >= needed AND notified_at IS NULL
