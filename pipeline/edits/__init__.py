"""Finished edits: found, asked, and counted."""
