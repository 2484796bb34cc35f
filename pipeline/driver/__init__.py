"""The driver of a run: checks, edits, summarises, logs."""
