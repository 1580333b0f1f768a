INSERT INTO embedding_pipeline.night (environment, asset_name, scheduled_at)
VALUES ($1, $2, $3) ON CONFLICT (environment, asset_name, scheduled_at) DO NOTHING
