"""`tersor`: starts the service or a part of it, manages API keys, and talks to a running service."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from app import __version__
from app.client import Client, ClientError
from app.client.client import WAIT_SECONDS
from app.contract.errors import TersorError
from app.contract.store import JobStore
from app.progress import follow, sending
from app.settings import Settings, get_settings

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Makes neural networks smaller and faster.")
keys = typer.Typer(no_args_is_help=True, help="API keys.")
app.add_typer(keys, name="keys")
console = Console()

Url = Annotated[str, typer.Option("--url", envvar="TERSOR_URL", help="The service's address.")]
Key = Annotated[str | None, typer.Option("--key", envvar="TERSOR_API_KEY", help="An API key.")]
DEFAULT_URL = "http://127.0.0.1:8000"


@app.command()
def version() -> None:
    """Prints the version."""
    console.print(__version__)


@app.command()
def up(
    host: Annotated[str | None, typer.Option(help="Address to bind to; other than loopback needs API keys.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Where everything is kept.")] = None,
) -> None:
    """Starts broker, API and one worker in the foreground; ends with them on SIGTERM or Ctrl-C."""
    from app.up import run

    given = {"host": host, "port": port, "data_dir": data_dir}
    run(Settings(**{name: value for name, value in given.items() if value is not None}))  # type: ignore[arg-type]


@app.command()
def api() -> None:
    """Runs the HTTP API alone; settings come from TERSOR_*."""
    from app.server import serve

    serve(get_settings())


@app.command()
def worker() -> None:
    """Runs one worker alone; settings come from TERSOR_*."""
    # By name, in place of this process: app knows nothing of the worker's code, and signals reach it directly.
    os.execv(sys.executable, [sys.executable, "-m", "worker.main"])


@app.command()
def demo() -> None:
    """Starts the service in a temporary folder and runs the main job on real MNIST digits."""
    from app.demo import run

    raise typer.Exit(run(console))


@app.command()
def submit(
    model: Annotated[Path, typer.Argument(help="The model's file.", exists=True, dir_okay=False)],
    dataset: Annotated[Path | None, typer.Option(help="The dataset's file.", exists=True, dir_okay=False)] = None,
    spec: Annotated[Path | None, typer.Option(help="The model's spec: a JSON file.", exists=True)] = None,
    recipe: Annotated[str | None, typer.Option(help="A named recipe.")] = None,
    steps: Annotated[Path | None, typer.Option(help="The steps: a JSON file with a list.", exists=True)] = None,
    wait: Annotated[bool, typer.Option(help="Follow the job to its end.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what the job would do.")] = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """Uploads a model and its data, submits a job, and follows it. Run again, it goes on where an upload broke off."""
    with Client(url, key) as client:
        with sending(model.name, console) as on_progress:
            uploaded = client.upload_model(model, json.loads(spec.read_text()) if spec else None, on_progress)
        job: dict[str, object] = {"model": uploaded["id"]}
        if dataset is not None:
            with sending(dataset.name, console) as on_progress:
                job["dataset"] = client.upload_dataset(dataset, on_progress=on_progress)["id"]
        if recipe is not None:
            job["recipe"] = recipe
        if steps is not None:
            job["steps"] = json.loads(steps.read_text())
        if dry_run:
            _await_inspections(client, job)
            console.print_json(json.dumps(client.dry_run(job)))
            return
        submitted = client.submit(job)
        console.print(submitted["id"])
        if wait:
            _print_job(follow(client, submitted["id"], console))


@app.command()
def status(job: str, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Prints a job."""
    with Client(url, key) as client:
        _print_job(client.job(job))


@app.command()
def fetch(
    job: str,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the artifacts and report.json.")] = Path(),
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """Downloads a job's artifacts and report, checking each digest."""
    out.mkdir(parents=True, exist_ok=True)
    with Client(url, key) as client:
        (out / "report.json").write_text(json.dumps(client.report(job), indent=2))
        for artifact in client.artifacts(job):
            path = client.download(job, artifact["name"], out)
            console.print(f"{path}  {artifact['size_bytes']} bytes  sha256 {artifact['sha256']}")


@app.command("unpack")
def unpack_artifact(
    file: Annotated[Path, typer.Argument(help="A packed artifact (.tsr).", exists=True, dir_okay=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="The safetensors file to write.")],
    max_bytes: Annotated[int, typer.Option(help="Refuse files that hold more bytes of tensors.")] = 4 << 30,
) -> None:
    """Unpacks a packed artifact into a safetensors file, with the same tensors bit for bit."""
    try:
        from app.unpacking import unpack_file
    except ImportError as missing:
        raise TersorError(f"unpack needs {missing.name}: pip install 'tersor[packed]'.") from None
    try:
        tensors = unpack_file(file, out, max_bytes)
    except OSError as error:
        raise TersorError(f"{out} cannot be written: {error.strerror}.") from None
    size = sum(tensor.nbytes for tensor in tensors.values())
    ratio = size / file.stat().st_size
    console.print(f"{out}  {len(tensors)} tensors, {size} bytes ({ratio:.1f} times the {file.stat().st_size} packed)")


@app.command()
def doctor(
    worker: Annotated[bool, typer.Option("--worker", help="Ask only whether a worker of this host is alive.")] = False,
) -> None:
    """Checks database, broker, blobs and workers; exit code 1 when one does not answer."""
    from app.doctor import examine

    findings = examine(get_settings(), socket.gethostname() if worker else None)
    for finding in findings:
        console.print(f"{'[green]ok[/green]  ' if finding.ok else '[red]FAIL[/red]'}  {finding.part}: {finding.detail}")
    raise typer.Exit(0 if all(finding.ok for finding in findings) else 1)


@keys.command("create")
def create_key(
    account: Annotated[str, typer.Option(help="The account that owns what is uploaded with this key.")],
    name: Annotated[str, typer.Option(help="What the key is for.")] = "",
) -> None:
    """Makes a key and prints it, once: only its hash is kept."""
    record, secret = _store().create_key(account, name)
    typer.echo(secret)
    typer.echo(f"key {record.prefix} of account {record.account}: keep it, it is not shown again", err=True)


@keys.command("list")
def list_keys() -> None:
    """Lists every key, without its secret."""
    table = Table("id", "account", "name", "prefix", "created", "last used", "revoked")
    for key in _store().list_keys():
        moments = [moment and moment.isoformat(timespec="seconds") for moment in (key.last_used_at, key.revoked_at)]
        created = key.created_at.isoformat(timespec="seconds")
        table.add_row(key.id, key.account, key.name, key.prefix, created, *(moment or "" for moment in moments))
    console.print(table)


@keys.command("revoke")
def revoke_key(key_id: str) -> None:
    """Ends a key; requests with it are refused from then on."""
    _store().revoke_key(key_id)


def _await_inspections(client: Client, job: dict[str, object]) -> None:
    """A dry run needs to know what was uploaded."""
    while client.model(str(job["model"]), wait=WAIT_SECONDS)["status"] == "inspecting":
        continue
    while "dataset" in job and client.dataset(str(job["dataset"]), wait=WAIT_SECONDS)["status"] == "inspecting":
        continue


def _store() -> JobStore:
    settings = get_settings()
    settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    store = JobStore.open(settings.database)
    store.migrate()
    return store


def _print_job(job: dict[str, object]) -> None:
    console.print_json(json.dumps(job))
    if job["state"] in ("failed", "cancelled"):
        raise typer.Exit(1)


def main() -> None:
    """The entry point: errors that a person can act on end with their sentence, not with a traceback."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        app()
    except (ClientError, TersorError) as error:
        Console(stderr=True).print(f"[red]error:[/red] {error}")
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
