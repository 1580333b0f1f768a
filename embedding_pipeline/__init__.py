"""Keeps pgvector embedding columns complete, current and comparable."""
