"""A language model without a fifth of its parameters: depth, width, low rank

SmolLM2-135M (as in `benchmarks language`) with 80 % of its parameters, made so in three ways and trained for 500 steps
on passages of half of the Brown corpus, from which the samples that the ways look at come too; perplexity is of
passages of the other half. Beside them the model as uploaded, trained in the same way: these texts are new to it as
well. Run it with PYTHONPATH=.models/python; TERSOR_BENCH_STEPS trains for so many steps (500), TERSOR_BENCH_WAY takes
one of the ways.
"""

from __future__ import annotations

import copy
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from app.contract.budgets import Budget, TimedBudget
from app.contract.factorizing import Factorize
from app.contract.resizing import Resize
from app.contract.spec import Finetune, Step
from app.contract.structured import StructuredPrune
from app.contract.training import Training
from benchmarks.harness import table, where
from benchmarks.language import EMBEDDINGS, TEST, documents, model_upload, passages, perplexity, texts_upload
from worker.context import Context
from worker.data import open_data
from worker.data.base import Data
from worker.data.feed import Feed
from worker.loading import load_model
from worker.model import Model
from worker.techniques.registry import TECHNIQUES
from worker.techniques.structure.limits import measured

SHARE = 0.8
LEARNED_WORDS = 64  # of a passage to learn from, which are some 90 tokens
SAMPLES = 128
STEPS = int(os.environ.get("TERSOR_BENCH_STEPS", "500"))
TRAINING = Training(steps=STEPS, batch_size=4, lr=1e-4, optimizer="adamw", schedule="cosine", warmup_share=0.1)
WAYS: dict[str, Step | None] = {
    "as uploaded": None,
    "depth": Resize(budget=Budget(parameters=SHARE), samples=SAMPLES),
    "width": StructuredPrune(
        budget=TimedBudget(parameters=SHARE), criterion="activations", scope="isomorphic", samples=SAMPLES
    ),
    "low rank": Factorize(
        budget=TimedBudget(parameters=SHARE), criterion="activations", samples=SAMPLES, exclude=EMBEDDINGS
    ),
}


def data(folder: Path) -> Path:
    """All of the even documents to learn from, in passages, and the beginnings of odd ones to be tested with."""
    learned = [
        " ".join(words[start : start + LEARNED_WORDS])
        for words in documents()[::2]
        for start in range(0, len(words) - LEARNED_WORDS, LEARNED_WORDS)
    ]
    return texts_upload(folder / "texts.zip", {"train": learned, "test": passages()[1::2][:TEST]})


def context_of(model: Model, teacher: nn.Module, texts: Data, folder: Path) -> Context:
    """With a copy of the model."""
    own = replace(model, module=copy.deepcopy(model.module))
    return Context(own, teacher, Feed(own, texts), torch.device("cpu"), 0, folder, lambda share: None)


def left(context: Context, whole: Model, measure: str) -> str:
    """The share of parameters, or of the work of a sample."""
    return f"{measured(measure, context.model) / measured(measure, whole):.3f}"


def main() -> None:
    """The table."""
    chosen, rows = os.environ.get("TERSOR_BENCH_WAY", ""), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = load_model(model_upload(folder), "model.zip", {}, folder)
        texts = open_data(data(folder), "texts.zip", {}, folder)
        for way, step in WAYS.items():
            if chosen not in ("", way):
                continue
            context = context_of(model, model.module, texts, folder)
            begun = time.perf_counter()
            if step is not None:
                TECHNIQUES[step.technique].apply(step, context)
            made = time.perf_counter() - begun
            assert context.feed is not None
            before = perplexity(context.model, context.model.module, context.feed)
            print(way, f"{before:.2f}", f"{made:.0f} s", flush=True)
            begun = time.perf_counter()
            TECHNIQUES["finetune"].apply(Finetune(training=TRAINING), context)
            trained = time.perf_counter() - begun
            after = perplexity(context.model, context.model.module, context.feed)
            shares = [left(context, model, measure) for measure in ("parameters", "macs")]
            rows.append([way, *shares, f"{before:.2f}", f"{after:.2f}", f"{made:.0f}", f"{trained:.0f}"])
            print(rows[-1], flush=True)
    columns = ["way", "parameters", "MACs", "perplexity", f"behind {STEPS} steps", "seconds to make", "to train"]
    table(columns, rows)
    where("torch", "transformers")
