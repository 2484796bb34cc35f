"""Scores before and after an edit, and their statistics."""
