"""The client's requests: what comes back is an answer or a ClientError."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

Document = dict[str, Any]


class ClientError(Exception):
    """The service refused, or did not answer. `problem` is its problem document; `status` is 0 without an answer."""

    def __init__(self, problem: Document, status: int = 0) -> None:
        self.problem = problem
        self.status = status
        where = problem.get("pointer") or problem.get("parameter")
        super().__init__(f"{problem['detail']}" + (f" ({where})" if where else ""))

    @property
    def code(self) -> str:
        """Stable; see `app.contract.errors`."""
        return str(self.problem["code"])


def send(http: httpx.Client, method: str, url: str, **request: Any) -> httpx.Response:
    """The answer to a request; raises ClientError."""
    with reachable():
        answer = http.request(method, url, **request)
    require(answer)
    return answer


@contextmanager
def reachable() -> Iterator[None]:
    """Makes a ClientError of what the network does."""
    try:
        yield
    except httpx.TransportError as error:
        url = error.request.url
        detail = f"{url.scheme}://{url.netloc.decode()} does not answer: {error or type(error).__name__}."
        raise ClientError({"code": "unreachable", "detail": detail, "retryable": True}) from error


def require(answer: httpx.Response) -> None:
    """Makes a ClientError of an answer that is one."""
    if not answer.is_error:
        return
    if answer.headers.get("content-type") == "application/problem+json" and answer.content:
        raise ClientError(answer.json(), answer.status_code)
    detail = f"The answer is {answer.status_code} {answer.reason_phrase} and no problem document: is this Tersor?"
    raise ClientError({"code": "not_tersor", "detail": detail, "retryable": False}, answer.status_code)
