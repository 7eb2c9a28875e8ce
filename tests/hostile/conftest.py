from __future__ import annotations

from tests.worker.conftest import pytest_collection_modifyitems  # noqa: F401  # which skips what the kernel lacks
