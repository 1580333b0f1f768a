UPDATE embedding_pipeline.night SET closed_at = now(), outcome = $4
WHERE environment = $1 AND asset_name = $2 AND scheduled_at = $3 AND closed_at IS NULL
