"""The embedded defaults: a Postgres and a model server for a machine that has neither."""
