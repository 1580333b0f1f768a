INSERT INTO embedding_pipeline.daily_spending AS spent
    (day, provider, usd, stopped_cap_usd, stopped_at)
VALUES ((now() AT TIME ZONE $1::text)::date, $2::text, 0, $3::float8, now())
ON CONFLICT (day, provider) DO UPDATE SET
    stopped_cap_usd = excluded.stopped_cap_usd,
    stopped_at = CASE WHEN spent.stopped_cap_usd = excluded.stopped_cap_usd
        THEN spent.stopped_at ELSE excluded.stopped_at END
