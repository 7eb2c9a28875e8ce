"""What the ranks of a job have in common."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import nn

from app.contract.errors import RankLost
from worker.ranks.ranks import Ranks
from worker.threads import with_threads
from worker.training.states import load_masks, mask_state, trained


def same_module(module: nn.Module, ranks: Ranks) -> None:
    """Gives every rank the masks, weights and statistics of the first: what each computes alone may differ in a bit.

    Raises Unusable where they do not have the same network.
    """
    if ranks.size == 1:
        return
    load_masks(module, ranks.told(lambda: mask_state(module)))
    ranks.alike(tensor for _, tensor in trained(module))


def check_saved(saved: Mapping[str, Path], ranks: Ranks) -> None:
    """Raises RankLost where hosts have fetched different checkpoints, as while a lost attempt stores one more."""
    if ranks.size == ranks.beside:
        return
    digests = {kind: hashlib.sha256(path.read_bytes()).hexdigest() for kind, path in saved.items()}
    if any(other != digests for other in ranks.listed(digests)):
        raise RankLost("The hosts of the training found different checkpoints of an earlier attempt.")


def check_same(module: nn.Module, ranks: Ranks) -> None:
    """Raises RuntimeError where the ranks of a training hold different weights: they would teach each other nonsense.

    Compares sums: equal steps on equal gradients leave the same bits.
    """
    if ranks.size == 1:
        return
    sums = torch.stack([weight.detach().double().sum() for weight in module.parameters()])
    found = ranks.gathered(sums)
    if not bool(((found == found[0]) | found.isnan()).all()):
        raise RuntimeError("the processes of the training have come to hold different weights")


def threads_shared(ranks: Ranks) -> AbstractContextManager[None]:
    """Within it, each rank computes with its share of the threads that the job has on its host."""
    return with_threads(max(1, torch.get_num_threads() // ranks.beside))
