-- Runs that incidents are about, and whether the incident is open; closed ones of the last days.
SELECT details ->> 'run_id', recovered_at IS NULL FROM embedding_pipeline.incident
WHERE environment = $1 AND kind = 'run' AND details ->> 'run_id' IS NOT NULL
    AND (recovered_at IS NULL OR recovered_at > now() - interval '2 days')
