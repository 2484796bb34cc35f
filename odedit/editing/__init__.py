"""The inner loop that optimises edits, and edits as files or merged into a checkpoint."""
