"""Logging to MLflow; no other folder imports it."""
