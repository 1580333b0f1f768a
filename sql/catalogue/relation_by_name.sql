-- What relation $2 in schema $1 is, in words.
SELECT CASE c.relkind WHEN 'i' THEN 'an index on ' WHEN 'I' THEN 'an index on ' WHEN 'r' THEN 'the table '
           WHEN 'p' THEN 'the table ' WHEN 'S' THEN 'the sequence ' ELSE 'the relation ' END
       || coalesce((SELECT i.indrelid::regclass::text FROM pg_index i WHERE i.indexrelid = c.oid),
                   c.oid::regclass::text)
FROM pg_class c
JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = $1 AND c.relname = $2
