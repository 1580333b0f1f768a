-- Open incidents, oldest first; not what was seen too rarely to be told and is gone again.
SELECT id, kind, subject, details, first_seen, last_seen, notified_at,
    (SELECT count(*) FROM embedding_pipeline.alert_message AS m
     WHERE m.incident_id = i.id AND m.delivered_at IS NOT NULL)
FROM embedding_pipeline.incident AS i
WHERE environment = $1 AND recovered_at IS NULL AND sightings > 0 ORDER BY first_seen, id
