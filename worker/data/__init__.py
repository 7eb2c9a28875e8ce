"""Dataset bytes to named splits; one module a kind of data."""

from worker.data.opener import open_data

__all__ = ["open_data"]
