"""Archives: what is dangerous is refused by name before anything is written; what is fine is read member by member."""

from __future__ import annotations

import gzip
import io
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.contract.errors import DatasetRejected
from tests.worker.loading.files import tarred, zipped
from worker.vetting.archive import Archive, open_archive

PLAIN = {"folder/a.txt": b"alpha", "folder/sub/b.txt": b"beta" * 1000}


def opened(content: bytes, folder: Path) -> Archive:
    path = folder / "archive"
    path.write_bytes(content)
    scratch = folder / "scratch"
    scratch.mkdir()
    return open_archive(path, scratch, DatasetRejected)


def plain_tar(files: dict[str, bytes]) -> bytes:
    return tarred(files, "w")


@pytest.mark.parametrize("pack", [zipped, tarred, plain_tar])
def test_members_are_read_without_the_top_folder(tmp_path: Path, pack: Callable[[dict[str, bytes]], bytes]) -> None:
    archive = opened(pack(PLAIN | {"__MACOSX/a": b"", "folder/.DS_Store": b""}), tmp_path)
    assert {name: member.read(10_000, DatasetRejected) for name, member in archive.members.items()} == {
        "a.txt": b"alpha",
        "sub/b.txt": b"beta" * 1000,
    }
    archive.members["a.txt"].extract(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"alpha"
    archive.close()


def test_a_folder_with_a_splits_name_stays(tmp_path: Path) -> None:
    assert list(opened(zipped({"train/cat/1.png": b"x"}), tmp_path).members) == ["train/cat/1.png"]


def test_closing_a_tar_removes_what_was_unpacked(tmp_path: Path) -> None:
    archive = opened(tarred(PLAIN), tmp_path)
    assert any((tmp_path / "scratch").iterdir())
    archive.close()
    assert not any((tmp_path / "scratch").iterdir())


def test_a_member_larger_than_its_use_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetRejected, match="4000 bytes; at most 10"):
        opened(zipped(PLAIN), tmp_path).members["sub/b.txt"].read(10, DatasetRejected)


NAMES = {
    "../evil": r"\.\.",
    "a/../../evil": r"\.\.",
    "/etc/passwd": "relative",
    "a\\..\\evil": "relative",
    "C:/evil": "relative",
    "a//b": "empty",
    "a\x1b[2Jb": "not printable",
    "x" * 1025: "too long",
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pack", [zipped, tarred])
def test_dangerous_names_are_refused(tmp_path: Path, pack: Callable[[dict[str, bytes]], bytes], name: str) -> None:
    with pytest.raises(DatasetRejected, match=NAMES[name]):
        opened(pack({"ok": b"", name: b"x"}), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["archive", "scratch"]


def tar_member(**fields: Any) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo("member")
        for name, value in fields.items():
            setattr(info, name, value)
        archive.addfile(info)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "fields",
    [
        {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"},
        {"type": tarfile.LNKTYPE, "linkname": "../../etc/passwd"},
        {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3},
        {"type": tarfile.FIFOTYPE},
    ],
)
def test_links_and_devices_of_a_tar_are_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(DatasetRejected, match="'member', a link or a device"):
        opened(tar_member(**fields), tmp_path)


def test_members_of_a_plain_tar_are_read_where_they_lie(tmp_path: Path) -> None:
    archive = opened(plain_tar(PLAIN), tmp_path)
    assert not any((tmp_path / "scratch").iterdir())
    place = archive.members["sub/b.txt"].section
    assert place is not None
    assert place.path == tmp_path / "archive"
    assert (tmp_path / "archive").read_bytes()[place.start : place.start + place.size] == b"beta" * 1000
    with archive.members["sub/b.txt"].open() as stream:
        assert stream.read() == b"beta" * 1000


@pytest.mark.parametrize("size", [-512, -1, 1 << 40, (1 << 80) - 1])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_size_that_leads_out_of_a_tar_is_refused(tmp_path: Path, size: int, kind: bytes) -> None:
    info = tarfile.TarInfo("member")
    info.type = kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = (size & ((1 << 88) - 1)).to_bytes(12, "big") if size < 0 else b"\x80" + size.to_bytes(11, "big")
    block[124] = 0xFF if size < 0 else 0x80
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    with pytest.raises(DatasetRejected, match=r"ends in the middle|damaged or was cut short|header of more than"):
        opened(bytes(block) + bytes(2048), tmp_path)


def test_a_long_header_of_a_plain_tar_is_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("pax")
    info.type = tarfile.XHDTYPE
    info.size = 1 << 20
    with pytest.raises(DatasetRejected, match="header of more than 65536 bytes"):
        opened(info.tobuf() + bytes(2 << 20), tmp_path)


def zip_entry(content: bytes = b"x", **fields: Any) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        info = zipfile.ZipInfo("member")
        for name, value in fields.items():
            setattr(info, name, value)
        archive.writestr(info, content)
    return buffer.getvalue()


def test_a_link_in_a_zip_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetRejected, match="'member', a link"):
        opened(zip_entry(b"/etc/passwd", external_attr=(stat.S_IFLNK | 0o777) << 16), tmp_path)


def test_an_unusual_compression_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetRejected, match="stored or deflated"):
        opened(zip_entry(compress_type=zipfile.ZIP_LZMA), tmp_path)


def test_an_encrypted_member_is_refused(tmp_path: Path) -> None:
    content = bytearray(zip_entry())
    central = content.index(b"PK\1\2")
    content[central + 8] |= 1  # general purpose flag
    with pytest.raises(DatasetRejected, match="encrypted"):
        opened(bytes(content), tmp_path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_comes_twice_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a", b"1")
        archive.writestr("a", b"2")
    with pytest.raises(DatasetRejected, match="'a' twice"):
        opened(buffer.getvalue(), tmp_path)


@pytest.mark.parametrize("pack", [zipped, tarred])
def test_a_bomb_is_refused_before_it_unpacks(tmp_path: Path, pack: Callable[[dict[str, bytes]], bytes]) -> None:
    with pytest.raises(DatasetRejected, match="zip bomb"):
        opened(pack({"zeros": bytes(100 << 20)}), tmp_path)
    written = sum(path.stat().st_size for path in (tmp_path / "scratch").rglob("*") if path.is_file())
    assert written <= 64 << 20


def test_a_bomb_in_a_tars_header_is_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("pax")
    info.type = tarfile.XHDTYPE
    info.size = 200 << 20
    with pytest.raises(DatasetRejected, match="zip bomb"):
        opened(gzip.compress(info.tobuf() + bytes(200 << 20), 1), tmp_path)


def test_a_zip_that_understates_a_size_is_damaged(tmp_path: Path) -> None:
    content = bytearray(zipped({"member": b"a" * 1000}))
    central = content.index(b"PK\1\2")
    content[central + 24 : central + 28] = (10).to_bytes(4, "little")  # the unpacked size
    archive = opened(bytes(content), tmp_path)
    with pytest.raises(DatasetRejected, match="'member' is damaged"):
        archive.members["member"].read(1000, DatasetRejected)


def test_a_zip_whose_directory_lies_before_the_file_is_damaged(tmp_path: Path) -> None:
    content = bytearray(zipped({"member": b"a" * 1000}))
    end = content.index(b"PK\5\6")
    content[end + 16 : end + 20] = (1 << 20).to_bytes(4, "little")  # where the directory starts
    with pytest.raises(DatasetRejected, match="damaged"):
        opened(bytes(content), tmp_path)


@pytest.mark.parametrize("pack", [zipped, tarred])
def test_too_many_members_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pack: Callable[[dict[str, bytes]], bytes]
) -> None:
    monkeypatch.setattr("worker.vetting.archive.MAX_MEMBERS", 50)  # a hundred thousand take long to write
    with pytest.raises(DatasetRejected, match="more than 50 files"):
        opened(pack({str(number): b"" for number in range(51)}), tmp_path)


@pytest.mark.parametrize("pack", [zipped, tarred, plain_tar])
def test_an_archive_cut_short_is_refused(tmp_path: Path, pack: Callable[[dict[str, bytes]], bytes]) -> None:
    with pytest.raises(DatasetRejected, match=r"cut short|ends in the middle"):
        opened(pack({"a": bytes(range(256)) * 100})[:-9000] if pack is plain_tar else pack(PLAIN)[:-40], tmp_path)
