-- Incidents that somebody was told of and that ended within so many seconds.
SELECT kind, details FROM embedding_pipeline.incident
WHERE environment = $1 AND recovered_at > now() - make_interval(secs => $2)
    AND notified_at IS NOT NULL
