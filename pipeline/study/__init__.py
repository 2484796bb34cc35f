"""Studies: runs that differ in a few settings and edit the same records, compared in tables and a picture."""
