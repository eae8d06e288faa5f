"""Formats of corpus files, a module each."""
