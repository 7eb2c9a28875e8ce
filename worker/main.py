"""The worker's entry point. Light on purpose: children import the main module too."""

from __future__ import annotations

import logging


def main() -> None:
    """Runs one worker until SIGTERM."""
    from app.settings import get_settings
    from worker.service import Service

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    settings = get_settings()
    settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    Service(settings).run()


if __name__ == "__main__":
    main()
