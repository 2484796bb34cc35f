"""The workers that run on Ray, which prepare and edit, and the graph that connects them."""
