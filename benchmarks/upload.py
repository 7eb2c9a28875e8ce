"""Upload throughput against a bare ASGI app that writes the body to a file

All get the same body over loopback from the same client, in turns. Tersor hashes it, syncs it to disk and records it
besides; a resumable upload is created, sent in one request, verified, and made a dataset. BENCH_UPLOAD_BYTES sets the
size.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil

from app.launch import service
from benchmarks.harness import bare_server, in_turns, ratio, seconds, table, where

MIB = 1 << 20
BODY_BYTES = int(os.environ.get("BENCH_UPLOAD_BYTES", 512 * MIB))
ROUNDS = 5
CHUNK = os.urandom(4 * MIB)


def body() -> Iterator[bytes]:
    """The body in chunks of 4 MiB."""
    for start in range(0, BODY_BYTES, len(CHUNK)):
        yield CHUNK[: BODY_BYTES - start]


def rate(send: Callable[[], None]) -> float:
    """MB/s of one upload that does not have to wait for what earlier ones left to be written to the disk."""
    os.sync()
    return BODY_BYTES / 1e6 / seconds(send)


def post(url: str) -> float:
    """MB/s of one upload."""
    headers = {"Content-Type": "application/octet-stream", "Content-Length": str(BODY_BYTES)}

    def send() -> None:
        httpx.post(url, content=body(), headers=headers, timeout=600).raise_for_status()

    return rate(send)


def post_resumable(url: str) -> float:
    """MB/s of one resumable upload, from its creation to the dataset made of it."""
    version = {"Tus-Resumable": "1.0.0"}
    patch = version | {"Content-Type": "application/offset+octet-stream", "Upload-Offset": "0"}

    def send() -> None:
        with httpx.Client(base_url=url, timeout=600) as http:
            create = version | {"Upload-Length": str(BODY_BYTES)}
            upload = http.post("/v1/uploads", headers=create).raise_for_status().headers["location"]
            headers = patch | {"Content-Length": str(BODY_BYTES)}
            http.patch(upload, content=body(), headers=headers).raise_for_status()
            http.post("/v1/datasets", json={"upload": upload.rpartition("/")[2]}).raise_for_status()

    return rate(send)


def post_small(url: str) -> None:
    """One tiny upload, so that code and connections are loaded before memory is read."""
    httpx.post(url, content=b"x", headers={"Content-Type": "application/octet-stream"}).raise_for_status()


def peak_memory(pid: int) -> int:
    """The highest resident memory that a process has ever had, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def api_process(data: Path) -> psutil.Process:
    """The API process of the service that keeps its data in a folder."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # others come and go
            if "api" in process.cmdline()[-1:] and process.environ().get("TERSOR_DATA_DIR") == str(data):
                return process
    raise LookupError("no API process")


def main() -> None:
    """Prints the table."""
    with tempfile.TemporaryDirectory() as name:
        os.environ["BENCH_BARE_FILE"] = str(Path(name) / "bare.bin")
        with service(Path(name)) as url, bare_server("benchmarks.bare:write_body") as bare:
            process = api_process(Path(name) / "data")
            post_small(f"{url}/v1/datasets?filename=warm.bin")
            before = process.memory_info().rss
            rivals = {
                "one request": lambda: post(f"{url}/v1/datasets?filename=bench.bin"),
                "resumable (tus)": lambda: post_resumable(url),
                "bare": lambda: post(bare),
            }
            results = in_turns(rivals, ROUNDS)
            grown = peak_memory(process.pid) - before
    bare_rates = results.pop("bare")
    table(
        ["body", "way", "Tersor, MB/s", "bare ASGI, MB/s", "ratio", "aim", "API memory grew by, at its peak"],
        [
            [
                f"{BODY_BYTES / MIB:.0f} MiB",
                way,
                f"{statistics.median(rates):.0f}",
                f"{statistics.median(bare_rates):.0f}",
                f"{ratio(rates, bare_rates):.2f}",
                ">= 0.8",
                f"{grown / MIB:.1f} MiB",
            ]
            for way, rates in results.items()
        ],
    )
    where("fastapi", "uvicorn", "obstore")
