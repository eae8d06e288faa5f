"""Samples and runs for people to look at."""
