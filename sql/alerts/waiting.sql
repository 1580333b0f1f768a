-- Undelivered messages of one channel, in the order in which they are to be sent.
SELECT m.id, m.event, m.title, m.body, m.attempts, m.not_before <= now()
FROM embedding_pipeline.alert_message AS m
JOIN embedding_pipeline.incident AS i ON i.id = m.incident_id
WHERE i.environment = $1 AND m.channel = $2
    AND m.delivered_at IS NULL AND m.given_up_at IS NULL
ORDER BY m.id LIMIT $3
