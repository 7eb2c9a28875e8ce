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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, NoReturn, cast

from app.contract.errors import TersorError
from app.contract.facts import split_named
from worker.vetting.section import Section

MAX_MEMBERS = 100_000
MAX_BYTES = 64 << 30  # unpacked
MAX_RATIO = 200  # unpacked : packed; photographs and float weights stay below 2, text below 20, zeros reach 1000
FREE_BYTES = 64 << 20  # below this an archive may compress as well as it likes
MAX_NAME = 1024
MAX_TAR_HEADER = 64 << 10  # long names and extended attributes; those of the largest known archives have below 4 kB
CHUNK = 1 << 20
_GZIP = b"\x1f\x8b"
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
    section: Section | None = None  # where it lies, if it lies in a file as it is

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
    """Opens a zip, tar or tar.gz file. Members of a tar are read where they lie; a tar.gz is inflated under `scratch`.

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
        budget = Budget(path.stat().st_size, error)
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
    size = path.stat().st_size
    with path.open("rb") as stream:
        zipped = stream.read(2) == _GZIP
    if not zipped:
        return Archive(tar_members(Section(path, 0, size), error), lambda: None)
    folder = Path(tempfile.mkdtemp(prefix="tar-", dir=scratch))
    plain = folder / "plain"
    _unzip(path, plain, Budget(size, error))
    members = tar_members(Section(plain, 0, plain.stat().st_size), error)
    return Archive(members, lambda: shutil.rmtree(folder, ignore_errors=True))


def _unzip(path: Path, plain: Path, budget: Budget) -> None:
    with gzip.open(path) as source, plain.open("xb") as target:
        while block := source.read(CHUNK):
            budget.charge(len(block))
            target.write(block)


def tar_members(section: Section, error: type[TersorError]) -> list[Member]:
    """The files of an uncompressed tar, to be read where they lie. Raises `error` as `open_archive` does."""
    names = _Names(error)
    members = []
    try:
        with section.open() as stream, tarfile.open(fileobj=_Headers(stream, error), mode="r:") as archive:
            while (info := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # it would keep every header that it has read
                if info.isdir():
                    _check_name(info.name, error)
                    continue
                _check_tar_entry(info, section.size, error)
                if names.admit(info.name):
                    place = section.within(info.offset_data, info.size)
                    members.append(Member(info.name.removeprefix("./"), info.size, place.open, place))
    except tarfile.TarError as failure:
        raise error(f"The archive is damaged or was cut short ({failure}). Pack and upload it again.") from failure
    return members


def _check_tar_entry(info: tarfile.TarInfo, end: int, error: type[TersorError]) -> None:
    if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or info.issparse():
        raise error(f"The archive holds {info.name!r}, a link or a device. Pack plain files only.")
    if info.size < 0 or info.offset_data + info.size > end:
        raise error(f"The archive ends in the middle of {info.name!r}. Pack and upload it again.")


class _Headers(io.RawIOBase):
    """What tarfile reads: headers alone, none of which is long. Members are skipped by seeking."""

    def __init__(self, stream: IO[bytes], error: type[TersorError]) -> None:
        self._stream = stream
        self._error = error

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def read(self, size: int = -1, /) -> bytes:
        if not 0 <= size <= MAX_TAR_HEADER:
            raise self._error(f"The archive holds a header of more than {MAX_TAR_HEADER} bytes: pack plain files only.")
        return self._stream.read(size)


class Budget:
    """How much a file of `packed` bytes may unpack to. Raises `error` where it is overdrawn."""

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
                f"The file would unpack to more than {self._limit} bytes out of {self._packed}: "
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
    if not (nested and len(tops) == 1) or split_named(next(iter(tops))) is not None:
        yield from members
        return
    for member in members:
        yield replace(member, name=member.name.partition("/")[2])
