-- How many rows of the column would be embedded anew under another expression: a full scan.
SELECT count(*) FROM {table} WHERE ({expected}) IS DISTINCT FROM {fingerprint}
    AND ({expected}) IS NOT NULL
