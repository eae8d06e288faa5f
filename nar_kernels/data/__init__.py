"""Data loading: corpora, windows, corrupted batches."""
