"""What nets must be, and how they are called."""
