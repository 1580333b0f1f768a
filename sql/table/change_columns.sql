-- One ALTER for everything that a table needs: one exclusive lock, held for milliseconds. Nullable
-- columns without a default rewrite nothing.
ALTER TABLE {table} {changes}
