INSERT INTO embedding_pipeline.daily_spending AS spent (day, provider, usd)
SELECT (now() AT TIME ZONE $1::text)::date, wanted.provider, $2::float8
FROM (VALUES (1, '*', $4::float8), (2, $3::text, $5::float8)) AS wanted (place, provider, cap)
WHERE wanted.cap IS NULL OR $2::float8 <= 0 OR $2::float8 <= wanted.cap
ORDER BY wanted.place
ON CONFLICT (day, provider) DO UPDATE SET usd = spent.usd + excluded.usd
WHERE excluded.usd <= 0
    OR spent.usd + excluded.usd
        <= coalesce(CASE spent.provider WHEN '*' THEN $4::float8 ELSE $5::float8 END, 'infinity')
RETURNING day, provider
