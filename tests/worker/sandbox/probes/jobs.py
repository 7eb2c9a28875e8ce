"""What jobs do: all of it must go on working behind the walls."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.worker.sandbox.probes.request import ProbeRequest


def train(request: ProbeRequest) -> str:
    """A small network on two threads; its loss goes down."""
    import torch

    torch.set_num_threads(2)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.LazyLinear(2))
    inputs, targets = torch.randn(64, 1, 8, 8), torch.randint(0, 2, (64,))
    net(inputs)
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    losses = []
    for _ in range(20):
        loss = torch.nn.functional.cross_entropy(net(inputs), targets)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    torch.save(net.state_dict(), request.work / "net.pt")
    torch.load(request.work / "net.pt", weights_only=True)
    return str(losses[-1] < losses[0])


def load_in_processes(request: ProbeRequest) -> str:
    """A DataLoader with two workers gives every sample, in order."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    data = TensorDataset(torch.arange(64, dtype=torch.float32).reshape(16, 4), torch.arange(16))
    batches = list(DataLoader(data, batch_size=4, num_workers=2))
    inputs, targets = (torch.cat([batch[i] for batch in batches]) for i in range(2))
    return f"{torch.equal(inputs, data.tensors[0])} {targets.tolist() == list(range(16))}"


def pool(request: ProbeRequest) -> str:
    import multiprocessing

    with multiprocessing.get_context("fork").Pool(2) as workers:
        found = workers.map(abs, [-1, -2, -3])
        workers.close()
        workers.join()  # an old kernel's walls let nobody be ended by a signal
        return str(found)


def program(request: ProbeRequest) -> str:
    """A Python program that imports this product's own code."""
    code = "import worker.evaluation.memory, sqlite3, ssl, tempfile; print(tempfile.mkdtemp())"
    root = Path(__file__).parents[4]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    return done.stderr or str(Path(done.stdout).parent == request.work)


def run_onnx(request: ProbeRequest, model: bytes, threads: int) -> str:
    import numpy as np
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: np.zeros((1, 1, 28, 28), dtype=np.float32)})
    return str(found.shape)


def import_transformers(request: ProbeRequest) -> str:
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    config = BertConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    folder = request.work / "bert"
    BertForSequenceClassification(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nyes\n")
    tokens = BertTokenizerFast(str(folder / "vocab.txt"))("yes", return_tensors="pt")
    again = BertForSequenceClassification.from_pretrained(folder)
    with torch.inference_mode():
        return str(tuple(again(**tokens).logits.shape))


def compile_with_gcc(request: ProbeRequest) -> str:
    import torch

    net = torch.nn.Linear(4, 4).eval()
    inputs = torch.randn(3, 4)
    with torch.inference_mode():
        return str(torch.allclose(torch.compile(net)(inputs).relu(), net(inputs).relu(), atol=1e-5))


def peak_memory(request: ProbeRequest, content: bytes) -> str:
    """The measurement that starts a fresh interpreter, which looks at its own size."""
    import numpy as np

    from worker.evaluation.memory import Probe, peak_memories

    np.savez(request.work / "inputs.npz", np.zeros((1, 1, 28, 28), dtype=np.float32))
    model = request.work / "model.onnx"
    model.write_bytes(content)
    probe = Probe(str(model), "model.onnx", {}, str(request.work / "inputs.npz"), str(request.work), 1)
    (found,) = peak_memories("onnxruntime", [probe])
    return str(0 < found < 32 << 20)
