"""Iterative unmasking: parallel decoding of masked positions."""
