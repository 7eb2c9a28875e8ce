"""The packed artifact, `.tsr`: any mixture of dense, sparse and coded tensors in one entropy-coded file.

The format is docs/packed.md. Needs numpy and constriction (`pip install tersor[packed]`), and nothing else of Tersor.
"""

from app.contract.errors import PackedDamaged as Damaged
from app.contract.packed.container import pack, unpack
from app.contract.packed.sizes import Sizes
from app.contract.packed.stored import Stored

__all__ = ["Damaged", "Sizes", "Stored", "pack", "unpack"]
