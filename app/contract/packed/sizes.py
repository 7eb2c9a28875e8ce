"""What the bytes of a packed file are for."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Sizes:
    """Bytes by purpose; `total` is the file's. Shares of an entropy-coded stream are fractions of bytes.

    `biases` are all tensors of fewer than two dimensions, whatever is in them; the others count by what is said of
    them: where the nonzero ones are, which values they have, and which values there are.
    """

    total: int = 0
    positions: float = 0.0
    values: float = 0.0
    codebooks: float = 0.0
    biases: float = 0.0
    tensors: dict[str, float] = field(default_factory=dict)

    @property
    def header(self) -> float:
        """All else: magic, digest, names, shapes, and the coder's last words."""
        return self.total - self.positions - self.values - self.codebooks - self.biases
