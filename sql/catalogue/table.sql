-- Everything that is asked about a source table, as one row. $1: its name, quoted as in SQL.
SELECT
    c.oid::bigint AS oid,
    n.nspname AS schema,
    c.relname AS name,
    c.relkind::text AS kind,
    c.relispartition AS is_partition,
    row_security_active(c.oid) AS rows_hidden,
    has_any_column_privilege(c.oid, 'SELECT') AS may_select,
    pg_has_role(c.relowner, 'USAGE') AS owned,
    current_user::text AS role,
    current_setting('server_encoding') AS encoding,
    (SELECT xn.nspname FROM pg_extension x JOIN pg_namespace xn ON xn.oid = x.extnamespace
     WHERE x.extname = 'vector') AS vector_schema,
    (SELECT coalesce(json_agg(json_build_object(
            'name', a.attname,
            'type', CASE
                WHEN tn.nspname = 'pg_catalog' OR NOT pg_type_is_visible(t.oid)
                THEN format_type(a.atttypid, a.atttypmod)
                ELSE quote_ident(tn.nspname) || '.' || format_type(a.atttypid, a.atttypmod) END,
            'type_name', t.typname,
            'type_schema', tn.nspname,
            'modifier', a.atttypmod,
            'not_null', a.attnotnull,
            'generated', a.attgenerated <> '' OR a.attidentity <> '') ORDER BY a.attnum), '[]')
     FROM pg_attribute a
     JOIN pg_type t ON t.oid = a.atttypid
     JOIN pg_namespace tn ON tn.oid = t.typnamespace
     WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped) AS columns,
    (SELECT coalesce(json_agg(keys.names), '[]')
     FROM pg_index i
     CROSS JOIN LATERAL (
         SELECT json_agg(a.attname) AS names FROM pg_attribute a
         WHERE a.attrelid = i.indrelid
           AND a.attnum = ANY (((i.indkey::int2[])[0:i.indnkeyatts - 1]))) AS keys
     WHERE i.indrelid = c.oid AND i.indisunique AND i.indisvalid
       AND i.indpred IS NULL AND i.indexprs IS NULL) AS unique_keys,
    (SELECT coalesce(json_agg(json_build_object(
            'name', g.tgname,
            'definition', pg_get_triggerdef(g.oid),
            'function', p.proname,
            'source', p.prosrc,
            'arguments', encode(g.tgargs, 'escape'),
            'row', (g.tgtype & 1) <> 0,
            'before', (g.tgtype & 2) <> 0,
            'columns', (SELECT coalesce(json_agg(a.attname), '[]') FROM pg_attribute a
                        WHERE a.attrelid = c.oid AND a.attnum = ANY (g.tgattr::int2[]))
            ) ORDER BY g.tgname), '[]')
     FROM pg_trigger g JOIN pg_proc p ON p.oid = g.tgfoid
     WHERE g.tgrelid = c.oid AND NOT g.tgisinternal AND g.tgenabled <> 'D'
       AND (g.tgtype & 16) <> 0) AS update_triggers,
    (SELECT count(*) FROM pg_inherits h JOIN pg_class d ON d.oid = h.inhrelid
     WHERE h.inhparent = c.oid AND NOT d.relispartition) AS children,
    (SELECT coalesce(json_agg(f.oid::regclass::text), '[]')
     FROM pg_partition_tree(c.oid) tree JOIN pg_class f ON f.oid = tree.relid
     WHERE f.relkind = 'f') AS foreign_partitions
FROM pg_class c
JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.oid = to_regclass($1)
