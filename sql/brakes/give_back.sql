UPDATE embedding_pipeline.daily_spending SET usd = usd - $3::float8
WHERE day = $1 AND provider IN ('*', $2::text)
