"""Techniques that leave a smaller dense network."""
