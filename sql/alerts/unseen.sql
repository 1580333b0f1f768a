-- Open incidents that were not among a tick's problems and could be judged: one tick nearer to
-- their end.
UPDATE embedding_pipeline.incident AS i
SET unseen = unseen + 1, sightings = CASE WHEN notified_at IS NULL THEN 0 ELSE sightings END
WHERE environment = $1 AND recovered_at IS NULL AND NOT EXISTS (
    SELECT FROM unnest($2::text[], $3::text[]) AS kept(kind, subject)
    WHERE kept.kind = i.kind AND kept.subject = i.subject
)
RETURNING id, unseen >= needed, notified_at IS NOT NULL, details, first_seen, now()
