"""Which windows of a corpus there are, and in which order they come."""
