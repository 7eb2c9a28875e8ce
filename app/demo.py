"""`tersor demo`: the main job on real digits, from nothing: start, train, upload, optimize, download, check."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from app.client import Client
from app.launch import service
from app.progress import follow

RECIPE = "small"
PLAIN_WIDTH = 104  # a log or a pipe has no width of its own; the table needs this much


def run(console: Console) -> int:
    """Returns 0 only if what was recomputed from the downloaded files equals the report."""
    if not console.is_terminal:
        console = Console(width=PLAIN_WIDTH)
    with tempfile.TemporaryDirectory(prefix="tersor-demo-") as name:
        folder = Path(name)
        console.print("Training LeNet-5 on 3,500 real MNIST digits: this is the user's model …")
        _python("worker.demo.train_lenet", str(folder))
        with service(folder) as url, Client(url) as client:
            console.print(f"Tersor runs on {url}. Uploading model and data, submitting recipe {RECIPE!r} …")
            job = _submit(client, folder)
            done = follow(client, job["id"], console)
            if done["state"] != "succeeded":
                console.print(f"[red]The job {done['state']}:[/red] {json.dumps(done['error'])}")
                return 1
            report = client.report(job["id"])
            files = [client.download(job["id"], item["name"], folder) for item in client.artifacts(job["id"])]
        return _judge(console, folder, report, files)


def _submit(client: Client, folder: Path) -> dict[str, Any]:
    spec = json.loads((folder / "lenet.spec.json").read_text())
    model = client.upload_model(folder / "lenet.safetensors", spec)
    dataset = client.upload_dataset(folder / "mnist.npz")
    return client.submit({"model": model["id"], "dataset": dataset["id"], "recipe": RECIPE})


def _judge(console: Console, folder: Path, report: dict[str, Any], files: list[Path]) -> int:
    """Recomputes size and accuracy of every file in a fresh process, prints the table, and compares with the report."""
    reported = {"lenet.safetensors": report["uploaded"]}
    reported |= {artifact["name"]: artifact["measurement"] for artifact in report["artifacts"]}
    columns = ("file", "bytes", "ratio", "accuracy", "recomputed", "latency", "runtime", "non-zeros")
    table = Table(*columns, title="Before (first row) and after", title_justify="left")
    agree = True
    for path in (folder / "lenet.safetensors", *files):
        measured, size = reported[path.name], path.stat().st_size
        again = json.loads(_python("worker.demo.recompute", str(path), str(folder / "mnist.npz")))
        accuracy = again["correct"] / again["samples"]
        same = measured["size_bytes"] == size and abs(measured["metric"]["value"] - accuracy) < 0.5 / again["samples"]
        agree = agree and same
        table.add_row(
            path.name,
            f"{size:,}",
            f"{report['uploaded']['size_bytes'] / size:.2f}x",
            f"{measured['metric']['value']:.2%}",
            f"{accuracy:.2%}" + (" =" if same else " DIFFERS"),
            f"{1e3 * measured['latency']['median_s']:.3f} ms",
            measured["runtime"],
            f"{measured['nonzero_parameters']:,}",
        )
    console.print(table)
    for warning in report["warnings"]:
        console.print(f"note: {warning}")
    console.print(
        "Every recomputed figure equals the report's."
        if agree
        else "[red]A recomputed figure differs from the report.[/red]"
    )
    return 0 if agree else 1


def _python(module: str, *arguments: str) -> str:
    """Runs a module in a fresh process and returns what it printed."""
    return subprocess.run(
        [sys.executable, "-m", module, *arguments], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
