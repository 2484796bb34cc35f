"""Local and remote files, written atomically."""
