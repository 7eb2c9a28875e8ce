"""What the child runs. Imports every probe, since that happens before the walls stand: tests lie outside of them."""

from __future__ import annotations

import errno
from types import ModuleType

from tests.worker import children
from tests.worker.sandbox.probes import excess, files, jobs, kernel, network, processes, ranks
from tests.worker.sandbox.probes.request import ProbeRequest
from worker.child import Report as Progress
from worker.messages import Inspected

MODULES: dict[str, ModuleType] = {
    module.__name__.rpartition(".")[2]: module for module in (excess, files, jobs, kernel, network, processes, ranks)
}


def answer(request: ProbeRequest, progress: Progress) -> Inspected:
    """The entry of the child. Leaves what the probe says, or what the kernel said to it."""
    module, name = request.probe.split(".")
    try:
        said = getattr(MODULES[module], name)(request, *request.arguments)
    except OSError as error:
        said = f"refused: {errno.errorcode[error.errno or 0]}"
    (request.work / "answer").write_text("reached" if said is None else str(said))
    return Inspected(facts=children.facts())
