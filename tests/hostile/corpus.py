"""The corpus: every family of hostile uploads."""

from __future__ import annotations

from tests.hostile import datasets, models

FAMILIES = models.FAMILIES | datasets.FAMILIES
