-- Open incidents that were due when no channel was configured.
SELECT id, details, first_seen FROM embedding_pipeline.incident AS i
WHERE environment = $1 AND recovered_at IS NULL AND notified_at IS NOT NULL AND NOT EXISTS (
    SELECT FROM embedding_pipeline.alert_message AS m WHERE m.incident_id = i.id
)
ORDER BY id
