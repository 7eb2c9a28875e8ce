"""Upload bytes to a Model; one module a format."""

from worker.loading.loader import load_model

__all__ = ["load_model"]
