-- What each channel has not taken yet, and why.
SELECT m.channel, count(*), min(m.created_at), max(m.attempts),
    (array_agg(m.last_error ORDER BY m.id) FILTER (WHERE m.last_error IS NOT NULL))[1],
    min(m.not_before)
FROM embedding_pipeline.alert_message AS m
JOIN embedding_pipeline.incident AS i ON i.id = m.incident_id
WHERE i.environment = $1 AND m.delivered_at IS NULL AND m.given_up_at IS NULL
GROUP BY 1 ORDER BY 1
