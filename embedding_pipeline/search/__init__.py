"""Searching embedding columns by meaning."""
