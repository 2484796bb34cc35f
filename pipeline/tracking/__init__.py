"""MLflow; no other folder imports it."""
