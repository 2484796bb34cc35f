"""Studies: many runs that differ in a few settings, compared on the same records, as a table and a picture."""
