-- The columns that the predicate of a table's only index reads. $1: the table's name.
SELECT DISTINCT a.attname, t.typcategory::text
FROM pg_index i
JOIN pg_depend d ON d.classid = 'pg_class'::regclass AND d.objid = i.indexrelid
    AND d.refclassid = 'pg_class'::regclass AND d.refobjid = i.indrelid AND d.refobjsubid > 0
JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = d.refobjsubid
JOIN pg_type t ON t.oid = a.atttypid
WHERE i.indrelid = $1::regclass AND i.indpred IS NOT NULL
ORDER BY 1
