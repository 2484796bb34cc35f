"""Places in the project that tests name."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""Folder of the whole project."""
