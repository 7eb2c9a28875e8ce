"""API keys: stored as hashes, shown once."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from datetime import datetime, timedelta

from sqlalchemy import insert, select, update

from app.contract.errors import NotFound
from app.contract.ids import ALPHABET, new_id
from app.contract.records import KeyRecord
from app.contract.store import rows
from app.contract.store.base import StoreBase
from app.contract.tables import keys

PREFIX_LENGTH = 8
SECRET_BYTES = 32  # 256 random bits: beyond guessing, so a plain hash is enough; 43 characters in base64
LAST_USED_EVERY = timedelta(minutes=1)  # a write a request would cost more than it tells


class Keys(StoreBase):
    """The statements on `api_keys`."""

    def create_key(self, account: str, name: str) -> tuple[KeyRecord, str]:
        """The key's record, and the only copy of its secret: `tsr_<8 characters>_<43 characters>`."""
        prefix = "".join(secrets.choice(ALPHABET) for _ in range(PREFIX_LENGTH))
        secret = f"tsr_{prefix}_{secrets.token_urlsafe(SECRET_BYTES)}"
        record = KeyRecord(new_id("key"), account, name, prefix, self._now(), None, None)
        with self._write() as connection:
            connection.execute(
                insert(keys).values(
                    id=record.id,
                    account=account,
                    name=name,
                    prefix=prefix,
                    sha256=_digest(secret),
                    created_at=record.created_at,
                )
            )
        return record, secret

    def authenticate(self, secret: str) -> str | None:
        """The account that the secret belongs to; None where it is unknown or revoked."""
        parts = secret.split("_", 2)
        if len(parts) != 3 or parts[0] != "tsr" or not secret.isascii():
            return None
        with self._read() as connection:
            row = connection.execute(select(keys).where(keys.c.prefix == parts[1])).one_or_none()
        if row is None or row.revoked_at is not None or not hmac.compare_digest(row.sha256, _digest(secret)):
            return None
        self._touch(row.id, row.last_used_at)
        return str(row.account)

    def _touch(self, key_id: str, last_used_at: datetime | None) -> None:
        now = self._now()
        if last_used_at is not None and now - last_used_at < LAST_USED_EVERY:
            return
        with self._write() as connection:
            connection.execute(update(keys).where(keys.c.id == key_id).values(last_used_at=now))

    def list_keys(self) -> list[KeyRecord]:
        """Every key, oldest first."""
        with self._read() as connection:
            return [rows.key(row) for row in connection.execute(select(keys).order_by(keys.c.id))]

    def revoke_key(self, id: str) -> None:
        """Ends a key for good; raises NotFound for one that does not exist."""
        with self._write() as connection:
            found = connection.execute(select(keys.c.revoked_at).where(keys.c.id == id)).one_or_none()
            if found is None:
                raise NotFound(f"There is no key {id}.")
            if found.revoked_at is None:
                connection.execute(update(keys).where(keys.c.id == id).values(revoked_at=self._now()))


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
