"""The specification of randomness, mask ratios and rounding, in PyTorch."""
