"""Reliability, locality and generality risks, and their scale gradients."""
