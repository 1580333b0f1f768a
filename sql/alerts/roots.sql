-- Incidents that somebody was told of and that are open, or ended within so many seconds.
SELECT kind, details FROM embedding_pipeline.incident
WHERE environment = $1 AND notified_at IS NOT NULL
    AND (recovered_at IS NULL OR recovered_at > now() - make_interval(secs => $2))
