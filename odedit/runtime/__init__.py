"""Process, memory, timing and kernel helpers that know no model."""
