"""From corpora to corrupted batches."""
