"""The store: what is uploaded, what is to be done, who does it. The database is the truth; the broker is a doorbell."""

from __future__ import annotations

from app.contract.store.access import Keys
from app.contract.store.fleet import Fleet
from app.contract.store.jobs import Jobs
from app.contract.store.resumables import Resumables
from app.contract.store.seats import Seats
from app.contract.store.uploads import Uploads
from app.contract.store.work import Work


class JobStore(Uploads, Resumables, Jobs, Work, Seats, Fleet, Keys):
    """Everything that app and worker keep in the database. Safe to share between threads, not between processes."""


__all__ = ["JobStore"]
