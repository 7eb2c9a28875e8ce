"""What tests of loading share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def plain_attention() -> Iterator[None]:
    """Without the fused kernel of nn.MultiheadAttention, which no export has and which rounds differently."""
    was_fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(was_fast)
