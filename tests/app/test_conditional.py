"""Ranges, tags, digests and preferences, as pure functions."""

from __future__ import annotations

import base64
import hashlib
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.conditional import digest_header, expected_sha256, matches, wanted_range
from app.contract.errors import RangeNotSatisfiable
from app.uploads.multipart import Form


@given(size=st.integers(0, 300), first=st.integers(0, 400), last=st.integers(0, 400))
def test_a_range_is_what_a_slice_gives(size: int, first: int, last: int) -> None:
    content = bytes(index % 251 for index in range(size))
    expected = content[first : last + 1]
    try:
        found = wanted_range(f"bytes={first}-{last}", None, '"t"', size)
    except RangeNotSatisfiable:
        assert not expected
        return
    if last < first:
        assert found is None
    else:
        assert found is not None
        assert content[slice(*found)] == expected != b""


@given(st.one_of(st.text(max_size=20), st.from_regex(r"\A ?bytes= ?[0-9]{0,3}-[0-9]{0,3},?\Z")))
def test_any_text_is_a_range_or_none(text: str) -> None:
    try:
        found = wanted_range(text, None, '"t"', 100)
    except RangeNotSatisfiable:
        return
    assert found is None or 0 <= found[0] < found[1] <= 100


@pytest.mark.parametrize(
    ("header", "holds"),
    [(None, False), ('"t"', True), ('W/"t"', True), ('"a", "t"', True), ("*", True), ('"a"', False), ("t", False)],
)
def test_tags(header: str | None, holds: bool) -> None:
    assert matches(header, '"t"') is holds


def test_digests_there_and_back() -> None:
    digest = hashlib.sha256(b"x")
    assert expected_sha256(digest_header(digest.hexdigest()), "Repr-Digest") == digest.digest()
    assert expected_sha256("sha-512=:eA==:", "Repr-Digest") is None
    assert base64.b64encode(digest.digest()).decode() in digest_header(digest.hexdigest())


@given(
    content=st.binary(max_size=2000),
    spec_first=st.booleans(),
    cuts=st.lists(st.integers(0, 2500), max_size=20),
)
def test_a_form_is_read_the_same_however_it_is_cut(content: bytes, spec_first: bool, cuts: list[int]) -> None:
    boundary = "----b0undary"
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="m.pt"\r\n\r\n'.encode() + content,
        f'--{boundary}\r\nContent-Disposition: form-data; name="spec"\r\n\r\n{{}}'.encode(),
    ]
    body = b"\r\n".join([*(parts[::-1] if spec_first else parts), f"--{boundary}--\r\n".encode()])
    edges = sorted({0, len(body), *(cut for cut in cuts if cut < len(body))})
    form = Form(f"multipart/form-data; boundary={boundary}", 1000)
    found = b"".join(b"".join(form.feed(body[a:b])) for a, b in itertools.pairwise(edges))
    form.finish()
    assert (found, form.filename, form.spec) == (content, "m.pt", b"{}")
