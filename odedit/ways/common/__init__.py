"""Code that several ways share."""
