"""Zip and tar files, read member by member. Nothing is ever extracted by an archive's own idea of where it belongs."""

from __future__ import annotations

import contextlib
import gzip
import io
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO, NoReturn, cast

from app.contract.errors import TersorError

MAX_MEMBERS = 100_000
MAX_BYTES = 64 << 30  # unpacked
MAX_RATIO = 200  # unpacked : packed; photographs and float weights stay below 2, text below 20, zeros reach 1000
FREE_BYTES = 64 << 20  # below this an archive may compress as well as it likes
MAX_NAME = 1024
CHUNK = 1 << 20
# What archivers of desktop systems add, and nobody means.
_JUNK = ("__MACOSX/", ".DS_Store", "Thumbs.db", "desktop.ini")
_ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ENCRYPTED = 0x1


@dataclass(frozen=True)
class Member:
    """A regular file in an archive: its vetted name with forward slashes, its unpacked size in bytes."""

    name: str
    size: int
    open: Callable[[], IO[bytes]]

    def read(self, limit: int, error: type[TersorError]) -> bytes:
        """All of it; raises `error` where it is larger than `limit` bytes."""
        if self.size > limit:
            raise error(f"{self.name!r} has {self.size} bytes; at most {limit} are taken.")
        with self.open() as stream:
            return stream.read(limit)

    def extract(self, path: Path) -> None:
        """Writes it to a file that must not exist yet."""
        with self.open() as source, path.open("xb") as target:
            shutil.copyfileobj(source, target, CHUNK)


class Archive:
    """The vetted members of an archive by name, in the archive's order; a single top folder is left out of names."""

    def __init__(self, members: list[Member], close: Callable[[], None]) -> None:
        self.members = {member.name: member for member in _without_top(members)}
        self.close = close


def open_archive(path: Path, scratch: Path, error: type[TersorError]) -> Archive:
    """Opens a zip, tar or tar.gz file. Members of a tar are unpacked into a new folder under `scratch`, under numbers.

    Raises `error` for absolute paths, `..`, links, devices, duplicates, control characters in names, encryption, more
    than MAX_MEMBERS files or MAX_BYTES, and for a ratio that no honest archive has.
    """
    try:
        return _open_zip(path, error) if zipfile.is_zipfile(path) else _open_tar(path, scratch, error)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, gzip.BadGzipFile) as failure:
        raise error(f"The archive is damaged or was cut short ({failure}). Pack and upload it again.") from failure


def _open_zip(path: Path, error: type[TersorError]) -> Archive:
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, ValueError, NotImplementedError) as failure:  # a directory that points outside of the file
        raise error(f"The archive's directory is damaged ({failure}). Pack and upload it again.") from failure
    with contextlib.ExitStack() as on_failure:
        on_failure.callback(archive.close)
        names = _Names(error)
        budget = _Budget(path.stat().st_size, error)
        members = []
        for info in archive.infolist():
            if info.filename.endswith("/"):
                _check_name(info.filename.rstrip("/"), error)
                continue
            _check_zip_entry(info, error)
            budget.spend(info.file_size)
            if names.admit(info.filename):
                members.append(Member(info.filename, info.file_size, _zip_opener(archive, info, error)))
        on_failure.pop_all()
    return Archive(members, archive.close)


def _check_zip_entry(info: zipfile.ZipInfo, error: type[TersorError]) -> None:
    if info.header_offset < 0:
        _damaged(info.filename, ValueError("it lies before the file's start"), error)
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG):
        raise error(f"The archive holds {info.filename!r}, a link or a device. Pack plain files only.")
    if info.flag_bits & _ENCRYPTED:
        raise error(f"{info.filename!r} is encrypted. Upload an archive without a password.")
    if info.compress_type not in _ZIP_METHODS:
        raise error(f"{info.filename!r} is compressed in an unusual way. Pack with plain zip (stored or deflated).")


def _zip_opener(archive: zipfile.ZipFile, info: zipfile.ZipInfo, error: type[TersorError]) -> Callable[[], IO[bytes]]:
    def opened() -> IO[bytes]:
        try:
            return cast(IO[bytes], _Checked(archive.open(info), info.filename, error))
        except (zipfile.BadZipFile, NotImplementedError, EOFError) as failure:
            _damaged(info.filename, failure, error)

    return opened


class _Checked(io.BufferedIOBase):
    """A member's stream, whose damage is a refusal that names the member."""

    def __init__(self, stream: IO[bytes], name: str, error: type[TersorError]) -> None:
        self._stream = stream
        self._name = name
        self._error = error

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1, /) -> bytes:
        try:
            return self._stream.read(-1 if size is None else size)
        except (zipfile.BadZipFile, zlib.error, EOFError) as failure:
            _damaged(self._name, failure, self._error)

    def close(self) -> None:
        self._stream.close()
        super().close()


def _damaged(name: str, failure: Exception, error: type[TersorError]) -> NoReturn:
    raise error(f"{name!r} is damaged in the archive ({failure}). Pack and upload it again.") from failure


def _open_tar(path: Path, scratch: Path, error: type[TersorError]) -> Archive:
    folder = Path(tempfile.mkdtemp(prefix="tar-", dir=scratch))
    names = _Names(error)
    members = []
    with path.open("rb") as raw, _plain(raw) as plain:
        bounded = _Bounded(plain, _Budget(path.stat().st_size, error))
        with tarfile.open(fileobj=bounded, mode="r|") as archive:
            for number, info in enumerate(archive):
                if info.isdir():
                    _check_name(info.name, error)
                elif info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or info.issparse():
                    raise error(f"The archive holds {info.name!r}, a link or a device. Pack plain files only.")
                elif names.admit(info.name):
                    target = folder / str(number)
                    _copy(archive, info, target, error)
                    members.append(Member(info.name.removeprefix("./"), info.size, _file_opener(target)))
    return Archive(members, lambda: shutil.rmtree(folder, ignore_errors=True))


def _copy(archive: tarfile.TarFile, info: tarfile.TarInfo, target: Path, error: type[TersorError]) -> None:
    stream = archive.extractfile(info)
    assert stream is not None  # a regular file
    with target.open("xb") as output:
        shutil.copyfileobj(stream, output, CHUNK)
    if target.stat().st_size != info.size:
        raise error(f"The archive ends in the middle of {info.name!r}. Pack and upload it again.")


def _file_opener(path: Path) -> Callable[[], IO[bytes]]:
    return lambda: path.open("rb")


@contextlib.contextmanager
def _plain(raw: BinaryIO) -> Iterator[IO[bytes]]:
    """The stream without its gzip layer, if it has one."""
    zipped = raw.read(2) == b"\x1f\x8b"
    raw.seek(0)
    if not zipped:
        yield raw
        return
    with gzip.GzipFile(fileobj=raw) as stream:
        yield cast(IO[bytes], stream)


class _Bounded(io.RawIOBase):
    """A stream that charges what is read to a budget: headers as well as members."""

    def __init__(self, stream: IO[bytes], budget: _Budget) -> None:
        self._stream = stream
        self._budget = budget

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        block = self._stream.read(size)
        self._budget.charge(len(block))
        return block


class _Budget:
    """How much an archive of `packed` bytes may unpack to."""

    def __init__(self, packed: int, error: type[TersorError]) -> None:
        self._packed = packed
        self._error = error
        self._bytes = 0
        self._limit = min(MAX_BYTES, max(FREE_BYTES, packed * MAX_RATIO))
        self._members = 0

    def spend(self, size: int) -> None:
        """One more member of that size."""
        self._members += 1
        if self._members > MAX_MEMBERS:
            raise self._error(f"The archive holds more than {MAX_MEMBERS} files.")
        self.charge(size)

    def charge(self, size: int) -> None:
        self._bytes += size
        if self._bytes > self._limit:
            raise self._error(
                f"The archive would unpack to more than {self._limit} bytes out of {self._packed}: "
                "that is a zip bomb, or data that should be sent without so much padding."
            )


class _Names:
    """The names seen so far."""

    def __init__(self, error: type[TersorError]) -> None:
        self._seen: set[str] = set()
        self._error = error

    def admit(self, name: str) -> bool:
        """Whether a file of this name is wanted; raises where the name is dangerous or came before."""
        _check_name(name, self._error)
        name = name.removeprefix("./")
        if name in self._seen:
            raise self._error(f"The archive holds {name!r} twice.")
        self._seen.add(name)
        if len(self._seen) > MAX_MEMBERS:
            raise self._error(f"The archive holds more than {MAX_MEMBERS} files.")
        base = name.rpartition("/")[2]
        return not (name.startswith(_JUNK) or base in _JUNK or base.startswith("._"))


def _check_name(name: str, error: type[TersorError]) -> None:
    parts = name.removeprefix("./").split("/")
    if name.startswith("/") or ".." in parts or "\\" in name or name[1:2] == ":":
        raise error(f"The archive holds the path {name!r}. Paths must be relative, with / and without '..'.")
    if name == ".":
        return
    if "" in parts or "." in parts or len(name) > MAX_NAME or not name.isprintable():
        raise error(f"The archive holds a name that is empty, too long or not printable: {name[:80]!r}.")


def _without_top(members: list[Member]) -> Iterator[Member]:
    tops = {member.name.partition("/")[0] for member in members}
    nested = all("/" in member.name for member in members)
    if not (nested and len(tops) == 1) or next(iter(tops)) in ("train", "validation", "test", "calibration"):
        yield from members
        return
    for member in members:
        yield Member(member.name.partition("/")[2], member.size, member.open)
