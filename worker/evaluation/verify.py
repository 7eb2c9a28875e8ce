"""Whether an artifact, loaded again from its bytes, says what it must say."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from app.contract.errors import ArtifactUnverified
from worker.data.batch import Inputs
from worker.data.feed import Feed
from worker.evaluation.artifact import OnnxFile, PackedFile, Reloaded, TorchFile
from worker.evaluation.program import ProgramFile
from worker.export.registry import Exported
from worker.loading.heads import to_outputs
from worker.loading.onnx_session import GraphSession
from worker.model import Model

# Another runtime adds in another order: float32 networks then agree to about four digits of the largest logit.
TOLERANCE_OTHER_RUNTIME = 1e-3
# A graph that computes in float16 rounds every value on its way.
TOLERANCE_HALF = 2e-2
# The same kernels on the same weights; only the number of threads may have changed since.
TOLERANCE_SAME_RUNTIME = 1e-5
# A program writes out what a layer may do in one kernel.
TOLERANCE_PROGRAM = 1e-4
# A program of integers may be so many times as far from the floats, in squares, as the graph it was made of: where a
# value lies between two codes, the order of a sum decides.
FURTHER = 10.0
SAMPLES = 32  # enough that a wrong axis or a fixed batch cannot hide, and quick on any model; fewer of long outputs


def check_samples(model: Model, feed: Feed | None) -> Inputs:
    """Real samples where there are any, else the model's example inputs; [at most SAMPLES, …]."""
    if feed is not None:
        for split in ("test", "validation", "calibration", "train"):
            if split in feed.data.splits:
                count = min(SAMPLES, model.task.evaluation_batch)
                return next(iter(feed.batches(split, count, limit=count))).inputs
    return model.example(batch=4)


def verify(exported: Exported, module: nn.Module, samples: Inputs, reload: Callable[[Exported], Reloaded]) -> Reloaded:
    """The artifact loaded again. Raises ArtifactUnverified unless it gives the outputs of `module`.

    A floating-point artifact must agree within float32 rounding, for one sample as for many. For an int8 one that is
    asked of the float file that it was made from; its own outputs must be finite and of the right shape (how good
    they are is for the report to say). A program of integers must be about as near to the module's outputs as the ONNX
    file with the same integers, and must not hold their floats as well.
    """
    loaded = reload(exported)
    native = loaded.native if isinstance(loaded, PackedFile) else loaded
    with torch.inference_mode():
        expected = to_outputs(loaded.output_kind, module(*samples).float().numpy())
    if isinstance(native, TorchFile):
        _check_equal(native, samples, expected, TOLERANCE_SAME_RUNTIME)
    elif isinstance(native, OnnxFile):
        judged = native if exported.reference in (None, exported.path) else native.float_reference()
        _check_equal(judged, samples, expected, TOLERANCE_HALF if judged.half else TOLERANCE_OTHER_RUNTIME)
    elif isinstance(native, ProgramFile):
        if twins := native.twins():
            raise ArtifactUnverified(f"{native.path.name} holds {', '.join(twins[:5])} as integers and as floats.")
        if native.integers is None:
            _check_equal(native, samples, expected, TOLERANCE_PROGRAM)
        else:
            _check_integers(native, samples, expected)
    _check_finite(loaded, samples, expected)
    return loaded


def _check_equal(loaded: Reloaded, samples: Inputs, expected: np.ndarray, tolerance: float) -> None:
    one = tuple(tensor[:1] for tensor in samples)
    for inputs, wanted in ((samples, expected), (one, expected[:1])):
        got = loaded.outputs(inputs)
        difference = float(np.max(np.abs(got - wanted))) if got.shape == wanted.shape else float("inf")
        allowed = tolerance * max(1.0, float(np.max(np.abs(expected))))
        if not difference <= allowed:  # also where either is not a number
            raise ArtifactUnverified(
                f"{loaded.path.name} was written, but its outputs differ by {difference:.3g} from the model's "
                f"on a batch of {len(wanted)} ({allowed:.3g} is allowed)."
            )


def _check_integers(loaded: ProgramFile, samples: Inputs, expected: np.ndarray) -> None:
    assert loaded.integers is not None
    graph = GraphSession(loaded.integers.path, loaded.input_names, torch.get_num_threads())
    bound = FURTHER * _noise(graph(samples), expected) + TOLERANCE_OTHER_RUNTIME**2 * float(np.square(expected).sum())
    noise = _noise(loaded.outputs(samples), expected)
    if loaded.outputs(tuple(tensor[:1] for tensor in samples)).shape != expected[:1].shape:
        raise ArtifactUnverified(f"{loaded.path.name} does not take a single sample.")
    if not noise <= bound:
        raise ArtifactUnverified(
            f"{loaded.path.name} was written, but its outputs are further from the model's than those of the ONNX file "
            f"with the same integers ({noise:.3g} against {bound:.3g}, sums of squares)."
        )


def _noise(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.square(got - expected).sum()) if got.shape == expected.shape else float("inf")


def _check_finite(loaded: Reloaded, samples: Inputs, expected: np.ndarray) -> None:
    got = loaded.outputs(samples)
    if got.shape != expected.shape or not np.isfinite(got).all():
        raise ArtifactUnverified(f"{loaded.path.name} gives outputs that are not finite or not of the right shape.")
