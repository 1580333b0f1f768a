SELECT provider, usd, stopped_cap_usd, stopped_at
FROM embedding_pipeline.daily_spending
WHERE day = (now() AT TIME ZONE $1::text)::date
ORDER BY provider
