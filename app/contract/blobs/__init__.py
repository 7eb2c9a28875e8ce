"""Bytes: uploads by their content, and outputs by job and attempt. In a folder, or in any object store of obstore."""

from __future__ import annotations

from app.contract.blobs.base import Blobs
from app.contract.blobs.keys import Stored, blob_key, checkpoint_key, checkpoint_prefix, output_key, output_prefix

__all__ = ["Blobs", "Stored", "blob_key", "checkpoint_key", "checkpoint_prefix", "output_key", "output_prefix"]
