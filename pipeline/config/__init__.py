"""A run's configuration: read, checked, and resolved."""
