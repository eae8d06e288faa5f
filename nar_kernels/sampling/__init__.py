"""Iterative unmasking."""
