"""Shared parts of editors: fine-tuning, hooks, trained weights, contrastive losses, key-value knowledge."""
