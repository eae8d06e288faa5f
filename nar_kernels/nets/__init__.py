"""The protocol of networks, and how they are called."""
