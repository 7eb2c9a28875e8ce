"""The doorbell: a Celery message that carries the id of a piece of work and nothing else.

The database is the truth. A message that is lost is sent again by the sweep, and one that comes twice finds the work
taken. So a broker that is down delays work and loses none, and ringing never fails a request.
"""

from __future__ import annotations

import logging
from typing import Any

import redis
from celery import Celery
from kombu.exceptions import OperationalError

log = logging.getLogger("tersor.queue")

TASK = "tersor.run"
QUEUE = "cpu"  # the one that every worker listens to
# A request that rings waits no longer than this for a broker that does not answer.
TIMEOUT_SECONDS = 1.0


class Doorbell:
    """Wakes a worker."""

    def __init__(self, broker_url: str) -> None:
        self._celery = celery(
            broker_url, {"socket_connect_timeout": TIMEOUT_SECONDS, "socket_timeout": TIMEOUT_SECONDS}
        )
        self._redis = redis.Redis.from_url(
            redis_url(broker_url), socket_connect_timeout=TIMEOUT_SECONDS, socket_timeout=TIMEOUT_SECONDS, retry=None
        )

    def ring(self, work_id: str) -> bool:
        """Asks for the work to be done; False where the broker does not answer: the sweep asks again."""
        try:
            self._celery.send_task(TASK, args=[work_id], queue=QUEUE, ignore_result=True, retry=False)
        except (OperationalError, redis.RedisError, OSError) as error:
            log.warning("the broker does not answer; the sweep will publish %s: %s", work_id, error)
            return False
        return True

    def ping(self) -> bool:
        """Whether the broker answers."""
        try:
            return bool(self._redis.ping())
        except (redis.RedisError, OSError):
            return False

    def close(self) -> None:
        """Closes every connection."""
        self._celery.close()
        self._redis.close()


def celery(broker_url: str, transport_options: dict[str, Any]) -> Celery:
    """A Celery application as both sides configure it: JSON alone, no results, early acknowledgement.

    Early, because the claim decides who works and the lease who has stopped: a message has done its duty when it was
    read.
    """
    made = Celery("tersor", broker=broker_url, set_as_current=False)
    made.conf.update(
        task_serializer="json",
        accept_content=["json"],
        task_ignore_result=True,
        task_acks_late=False,
        task_create_missing_queues=True,
        worker_prefetch_multiplier=1,
        worker_send_task_events=False,
        worker_enable_remote_control=False,
        worker_hijack_root_logger=False,
        broker_connection_retry=True,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,  # a hundred by default, after which a worker is deaf for good
        broker_transport_options={"max_retries": 0, **transport_options},
        task_publish_retry=False,
        broker_pool_limit=50,  # as many as threads that may ring at once: none waits for another one's time-out
        enable_utc=True,
    )
    return made


def redis_url(broker_url: str) -> str:
    """Celery's name for a socket (`redis+socket://`) in the words of the redis client (`unix://`)."""
    return broker_url.replace("redis+socket://", "unix://", 1)
