"""The configuration of a run: reading, validation and resolution."""
