"""The packed artifact, `.tsr`: any mixture of dense, sparse and coded tensors in one entropy-coded file.

The format is docs/packed.md. Needs numpy and constriction (`pip install tersor[packed]`), and nothing else of Tersor.
"""

from app.contract.packed.container import pack, unpack
from app.contract.packed.sizes import Sizes
from app.contract.packed.stored import Stored
from app.contract.packed.wire import Damaged

__all__ = ["Damaged", "Sizes", "Stored", "pack", "unpack"]
