"""What a corpus holds: one pass over all ids, and how long documents are."""
