"""Scores before and after an edit, their columns, and their statistics."""
