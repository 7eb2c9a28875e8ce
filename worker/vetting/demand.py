"""How much a model may ask for: a few numbers in a small file can describe values of any size."""

from __future__ import annotations

# One value inside a model for one sample: 64 channels of 1024 x 1024 in float32. An inspection holds a few at a time.
MAX_SAMPLE_BYTES = 256 << 20
EXAMPLES = 2  # samples that a model is tried on
