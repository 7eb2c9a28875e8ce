"""Who asks: an API key's account, or the account of this machine's user while the service is bound to loopback."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends, Request

from app.contract.errors import Unauthorized
from app.services import in_thread, services_of
from app.settings import is_loopback

LOCAL_ACCOUNT = "local"
PROXY_HEADERS = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via")
MAX_SECRET = 256  # ours have 56 characters; longer ones are not worth a look into the database


async def authenticated(request: Request) -> str:
    """The account of the request. Raises Unauthorized for a key that is not valid, and for none where one is needed."""
    services = services_of(request)
    header = request.headers.get("authorization")
    if header is None:
        if services.settings.keys_required:
            raise Unauthorized()
        if services.settings.api_keys_required is None and not from_this_machine(request):
            raise Unauthorized(
                "Without an API key the service answers only what was sent to it on this machine, by its loopback "
                "address and past no proxy and no web page of another origin. Send an API key."
            )
        return LOCAL_ACCOUNT
    scheme, _, secret = header.partition(" ")
    secret = secret.strip()
    if scheme.lower() != "bearer" or not secret:
        raise Unauthorized()
    account = await in_thread(services.store.authenticate, secret) if len(secret) <= MAX_SECRET else None
    if account is None:
        raise Unauthorized("This API key is unknown or was revoked. `tersor keys create` makes one.")
    return account


def from_this_machine(request: Request) -> bool:
    """Whether a request to a loopback address was also meant for it.

    A web page elsewhere can make a browser send requests here (cross-site forms, DNS rebinding), and a proxy on this
    machine forwards those of others: both show in the headers.
    """
    headers = request.headers
    if any(name in headers for name in PROXY_HEADERS):
        return False
    meant = [f"//{headers.get('host', '')}"] + ([headers["origin"]] if "origin" in headers else [])
    return all(is_loopback(_hostname(address)) for address in meant)


def _hostname(address: str) -> str:
    try:
        return urlsplit(address).hostname or ""
    except ValueError:
        return ""


Account = Annotated[str, Depends(authenticated)]
