"""Compression to the fewest bytes that a limit on the loss of accuracy allows."""
