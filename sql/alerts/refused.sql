-- A message did not arrive: it is tried again later, and given up after so many days.
UPDATE embedding_pipeline.alert_message
SET attempts = attempts + 1, last_error = $2,
    not_before = now() + make_interval(secs => least($4::float8,
        $3::float8 * (2 ^ least(attempts, 20)))),
    given_up_at = CASE WHEN created_at < now() - make_interval(days => $5) THEN now() END
WHERE id = $1
