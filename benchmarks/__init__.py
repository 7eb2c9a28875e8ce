"""Ratios against peers, both measured in turns within one run; each module prints a table in Markdown."""
