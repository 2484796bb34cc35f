"""A file of records to fill in."""

from __future__ import annotations

TEMPLATE = """\
image,question,answer
pictures/1.jpg,What is the name of this bridge?,the North Gate
pictures/2.jpg,Who works at this desk?,Anna Frost
"""
"""CSV with the three columns that a record needs; further ones, see `odedit/data/README.md`."""
