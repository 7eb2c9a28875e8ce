"""The end of a resumable upload that nobody wants any more."""

from __future__ import annotations

import logging

from obstore.exceptions import BaseError as StoreError

from app.contract.blobs import Blobs
from app.contract.blobs.partial import Partial
from app.contract.errors import UploadLocked
from app.contract.records import ResumableRecord
from app.contract.store import JobStore

log = logging.getLogger("tersor.uploads")

# A request that holds an upload says so three times within this; where the blob store itself excludes others, nobody
# waits for a lease to end.
LEASE_SECONDS = 30.0
BATCH = 50  # uploads removed at once, so that whoever does it gets on with other things; the rest has time


def remove_expired(store: JobStore, blobs: Blobs) -> int:
    """Removes uploads that have expired, with their bytes unless something else uses them; how many there were."""
    return sum(_remove_expired(store, blobs, id) for id in store.expired_resumables(BATCH))


def _remove_expired(store: JobStore, blobs: Blobs, id: str) -> bool:
    try:
        return _try_to_remove(store, blobs, id)
    except UploadLocked:
        return False
    except (OSError, StoreError) as error:  # the next round tries again; the other uploads need not wait for it
        log.warning("%s has expired, but could not be removed: %s", id, error)
        return False


def _try_to_remove(store: JobStore, blobs: Blobs, id: str) -> bool:
    partial = blobs.partial(id)
    try:
        held = store.take_expired(id, LEASE_SECONDS, partial.exclusive)
        if held is not None:
            remove(store, blobs, partial, held)
        return held is not None
    finally:
        partial.close()


def remove(store: JobStore, blobs: Blobs, partial: Partial, held: ResumableRecord) -> None:
    """Removes an upload that the caller holds. First its bytes: what is left of a removal that broke off is a record,
    which expires, and not bytes that nobody knows of."""
    partial.discard()
    store.drop_resumable(held, lambda sha256: blobs.delete(blobs.blob_key(sha256)))
