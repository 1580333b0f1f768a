-- The parent's index becomes valid when every partition's index is attached.
ALTER INDEX {parent} ATTACH PARTITION {index}
