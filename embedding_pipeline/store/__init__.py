"""Postgres: schema, pending rows, the compare-and-swap writer, leases, indexes, the registry."""
