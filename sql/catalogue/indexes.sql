-- The indexes of a table and of its partitions. $1: the table's oid.
SELECT
    i.indrelid::bigint AS table_oid,
    i.indexrelid::bigint AS oid,
    n.nspname AS schema,
    c.relname AS name,
    c.relkind::text AS kind,
    i.indisvalid AND i.indisready AND i.indislive AS valid,
    (SELECT h.inhparent::bigint FROM pg_inherits h WHERE h.inhrelid = i.indexrelid) AS parent_oid,
    am.amname AS method,
    (SELECT json_agg(pg_get_indexdef(i.indexrelid, k, true) ORDER BY k)
     FROM generate_series(1, i.indnatts) AS k) AS keys,
    (SELECT json_agg(o.opcname ORDER BY u.position)
     FROM unnest(i.indclass::oid[]) WITH ORDINALITY AS u (class, position)
     JOIN pg_opclass o ON o.oid = u.class) AS operator_classes,
    (SELECT json_agg(l.collname ORDER BY u.position)
     FROM unnest(i.indcollation::oid[]) WITH ORDINALITY AS u (collation_oid, position)
     LEFT JOIN pg_collation l ON l.oid = u.collation_oid) AS collations,
    pg_get_expr(i.indpred, i.indrelid) AS predicate,
    (SELECT coalesce(json_agg(DISTINCT a.attname), '[]')
     FROM pg_depend d
     JOIN pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
     WHERE d.classid = 'pg_class'::regclass AND d.objid = i.indexrelid
       AND d.refclassid = 'pg_class'::regclass AND d.refobjid = i.indrelid
       AND d.refobjsubid > 0) AS columns,
    pg_relation_size(i.indexrelid) AS bytes,
    c.reltuples AS tuples,
    (SELECT min(p.pid) FROM pg_stat_progress_create_index p
     WHERE p.index_relid = i.indexrelid) AS building_pid
FROM pg_index i
JOIN pg_class c ON c.oid = i.indexrelid
JOIN pg_namespace n ON n.oid = c.relnamespace
JOIN pg_am am ON am.oid = c.relam
WHERE i.indrelid IN (
    SELECT $1::bigint::oid
    UNION
    SELECT relid FROM pg_partition_tree($1::bigint::oid::regclass))
ORDER BY c.relname
