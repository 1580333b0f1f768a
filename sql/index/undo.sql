-- After a build that failed: the INVALID index is still kept up to date by every write.
DROP INDEX CONCURRENTLY IF EXISTS {index}
