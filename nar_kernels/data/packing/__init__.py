"""How whole documents share rows of ``seq_len`` tokens."""
