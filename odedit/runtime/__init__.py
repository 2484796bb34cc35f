"""Process, memory, timing and kernel helpers, independent of models."""
