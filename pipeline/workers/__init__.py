"""What runs on Ray: preparing and editing workers, and the graph between them."""
