"""Every setting of Tersor, from the environment (`TERSOR_*`)."""

from __future__ import annotations

import hashlib
import ipaddress
import os
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

GIB = 1 << 30
MAX_SOCKET_PATH = 100  # the kernel takes 107 bytes; clients add a little


class Settings(BaseSettings):
    """One object for app and worker; `tersor up` fills in what is not set."""

    model_config = SettingsConfigDict(env_prefix="TERSOR_", extra="ignore")

    data_dir: Path = Field(Path("tersor-data"), description="Where the embedded parts keep their files.")
    database_url: str = Field("", description="SQLAlchemy URL; empty: SQLite in data_dir.")
    broker_url: str = Field("", description="redis:// URL of Valkey or Redis; empty: the embedded one in data_dir.")
    blobs_url: str = Field("", description="file://, s3://, gs:// or az:// URL; empty: a folder in data_dir.")

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys_required: bool | None = Field(None, description="Unset: required unless bound to loopback.")
    max_upload_bytes: int = 64 * GIB
    max_json_bytes: int = 1 << 20
    max_open_uploads: int = Field(100, description="Unfinished resumable uploads of one account.")
    upload_expiry_seconds: float = Field(
        24 * 3600.0, description="A resumable upload is kept this long after its last byte."
    )

    worker_concurrency: int = 1
    worker_threads: int = Field(0, description="Compute threads of one job; 0: all cores / concurrency.")
    lease_seconds: float = Field(30.0, description="A silent worker loses its work after this long.")
    republish_seconds: float = Field(
        5.0, description="First wait before a queued job's message is sent again; doubles."
    )
    max_attempts: int = Field(3, description="How often a job is started again after its worker was lost.")
    cancel_grace_seconds: float = Field(2.0, description="From SIGTERM to SIGKILL of a cancelled job's process group.")
    checkpoint_seconds: float = Field(30.0, description="A job's checkpoints are stored this far apart at least.")
    job_timeout_seconds: float = 24 * 3600.0
    job_memory_bytes: int = Field(
        0, description="Resident memory of a job's process group; 0: 90 % of the machine / concurrency."
    )
    job_disk_bytes: int = Field(64 * GIB, description="What a job may write to its scratch folder in all.")
    job_processes: int = Field(4096, description="Processes and threads that a job may have at once.")
    ranks_interface: str = Field(
        "",
        description="Network interface by which trainings over several hosts connect their processes, such as eth1: "
        "a private one. Empty: this worker takes no part in them.",
    )
    hosts_wait_seconds: float = Field(600.0, description="How long such a training waits for other workers.")
    inspect_timeout_seconds: float = 600.0
    inspect_memory_bytes: int = Field(
        900 << 20, description="What an inspection's process may take, besides six times the upload's bytes."
    )
    sandbox: Literal["require", "auto", "off"] = Field(
        "auto", description="Walls around what touches uploads; auto: as many as the kernel offers."
    )
    sandbox_readable: str = Field("", description="More folders that jobs may read, separated by colons.")

    @property
    def database(self) -> str:
        return self.database_url or f"sqlite:///{self.data_dir.resolve() / 'tersor.db'}"

    @property
    def broker(self) -> str:
        return self.broker_url or f"redis+socket://{self.broker_socket}"

    @property
    def broker_socket(self) -> Path:
        """The embedded broker's socket; in a short folder of its own where data_dir is too long for a socket's name."""
        data_dir = self.data_dir.resolve()
        path = data_dir / "valkey" / "valkey.sock"
        if len(str(path)) <= MAX_SOCKET_PATH:
            return path
        digest = hashlib.sha256(str(data_dir).encode()).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"tersor-{os.getuid()}-{digest}" / "valkey.sock"

    @property
    def blobs(self) -> str:
        return self.blobs_url or f"file://{self.data_dir.resolve() / 'blobs'}"

    @property
    def scratch(self) -> Path:
        return self.data_dir.resolve() / "scratch"

    @property
    def readable_folders(self) -> tuple[Path, ...]:
        return tuple(Path(name) for name in self.sandbox_readable.split(os.pathsep) if name)

    @property
    def own_folders(self) -> tuple[Path, ...]:
        """Where this process keeps what is no job's business, as far as that is on this machine."""
        urls = (self.database.removeprefix("sqlite:///"), self.blobs.removeprefix("file://"))
        return (self.data_dir.resolve(), *(Path(url) for url in urls if "://" not in url))

    @property
    def keys_required(self) -> bool:
        return self.api_keys_required if self.api_keys_required is not None else not is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether a bind address can be reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@lru_cache
def get_settings() -> Settings:
    """The settings of this process."""
    return Settings()
