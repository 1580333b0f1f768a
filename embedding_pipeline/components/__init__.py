"""The Dagster side of a table: one YAML file becomes its assets, checks and sensor."""
