"""Visualisation: samples, decoding steps and training curves."""
