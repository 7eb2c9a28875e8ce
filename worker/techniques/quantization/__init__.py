"""Floating point to integers."""
