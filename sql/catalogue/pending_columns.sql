-- The columns that an index depends on, by key or by predicate, as they are written in SQL, with
-- the predicate itself. $1: the index's schema, $2: its name.
SELECT DISTINCT a.attname, quote_ident(a.attname), pg_get_expr(i.indpred, i.indrelid)
FROM pg_class c
JOIN pg_namespace n ON n.oid = c.relnamespace
JOIN pg_index i ON i.indexrelid = c.oid AND i.indpred IS NOT NULL
JOIN pg_depend d ON d.classid = 'pg_class'::regclass AND d.objid = i.indexrelid
    AND d.refclassid = 'pg_class'::regclass AND d.refobjid = i.indrelid AND d.refobjsubid > 0
JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = d.refobjsubid
WHERE n.nspname = $1 AND c.relname = $2
ORDER BY 1
