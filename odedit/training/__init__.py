"""Weights that an editor learns before it edits."""
