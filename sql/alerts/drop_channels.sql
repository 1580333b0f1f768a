-- Messages for channels that are no longer configured will never be sent.
UPDATE embedding_pipeline.alert_message AS m
SET given_up_at = now(), last_error = coalesce(m.last_error, 'no longer in ALERT_URLS')
FROM embedding_pipeline.incident AS i
WHERE i.id = m.incident_id AND i.environment = $1 AND m.delivered_at IS NULL
    AND m.given_up_at IS NULL AND NOT m.channel = ANY($2::text[])
