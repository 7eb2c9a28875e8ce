"""A throw-away PostgreSQL server for tests; skips, with the reason, where none is installed."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from app.launch import free_port


def _binaries() -> Path:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    if found:
        return found[-1].parent
    on_path = shutil.which("postgres")
    if on_path is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    return Path(on_path).parent


@contextmanager
def postgres_server() -> Iterator[str]:
    """Yields the SQLAlchemy URL of an empty database on loopback."""
    binaries = _binaries()
    user = "postgres" if os.getuid() == 0 else None  # PostgreSQL refuses to run as root
    with TemporaryDirectory(prefix="tersor-pg-") as name:
        folder = Path(name)
        if user is not None:
            owner = pwd.getpwnam(user)
            os.chown(folder, owner.pw_uid, owner.pw_gid)
        data, port = folder / "data", free_port()

        def command(program: str, *arguments: str) -> None:
            subprocess.run([binaries / program, *arguments], check=True, user=user, stdout=subprocess.DEVNULL, cwd="/")

        command("initdb", "-D", str(data), "-U", "tersor", "--auth=trust", "--no-sync")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -k {folder} -c fsync=off"
        command("pg_ctl", "-D", str(data), "-l", str(folder / "log"), "-o", options, "-w", "start")
        try:
            yield f"postgresql+psycopg://tersor@127.0.0.1:{port}/postgres"
        finally:
            command("pg_ctl", "-D", str(data), "-m", "immediate", "-w", "stop")
