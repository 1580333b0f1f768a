-- A partitioned table's partitions, parents before children. $1: the table's oid.
SELECT tree.relid::oid::bigint AS oid, tree.parentrelid::oid::bigint AS parent_oid,
       tree.isleaf AS is_leaf, n.nspname AS schema, c.relname AS name
FROM pg_partition_tree($1::bigint::oid::regclass) AS tree
JOIN pg_class c ON c.oid = tree.relid
JOIN pg_namespace n ON n.oid = c.relnamespace
ORDER BY tree.level, n.nspname, c.relname
