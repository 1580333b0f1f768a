-- TRUNCATE off: giving pages back to the system would ask for an exclusive lock.
VACUUM (TRUNCATE off, SKIP_LOCKED) {table}
