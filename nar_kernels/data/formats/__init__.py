"""Corpus file formats, one module each."""
