"""Training of the weights that an editor has before any edit."""
