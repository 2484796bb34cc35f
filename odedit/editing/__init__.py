"""The inner loop: descent on the edit, ascent on the multiplier."""
