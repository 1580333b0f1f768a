-- Whether pgvector can be installed, and where: in `extensions` where the host has made such a
-- schema for them, else where new objects go.
SELECT EXISTS (SELECT FROM pg_available_extensions WHERE name = 'vector'),
       coalesce((SELECT nspname FROM pg_namespace
                 WHERE nspname = 'extensions' AND has_schema_privilege(oid, 'CREATE')),
                current_schema(), 'public')
