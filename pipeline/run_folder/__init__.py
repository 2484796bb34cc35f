"""The files in a run's folder `out`: input records, result rows, edits, summary."""
