SELECT asset_name, scheduled_at, extract(epoch FROM now() - opened_at)::float8
FROM embedding_pipeline.night
WHERE environment = $1 AND closed_at IS NULL
ORDER BY scheduled_at, asset_name
