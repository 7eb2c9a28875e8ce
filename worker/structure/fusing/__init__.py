"""Networks without what they compute for nothing."""
