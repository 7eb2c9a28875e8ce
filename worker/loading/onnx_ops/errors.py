"""Why a graph cannot be imported as a trainable module."""

from __future__ import annotations


class Unsupported(Exception):
    """What the operator does that has no form in torch here; completes "operator X …", without a full stop."""
