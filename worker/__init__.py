"""Everything that imports torch. Of `app` it imports `app.contract` and `app.settings` alone."""

import os

# Read when onnxruntime is imported: it would keep a database at home and send word of every session to its maker.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

# Read when torch is imported. A thread that is through with its share of an operation looks this often whether the
# others are, and then sleeps. GNU's OpenMP looks 300,000 times: on a machine that does other work besides, that takes
# the core which the last thread waits for. Steps of a training with two threads took 2.4 times as long there, and
# nothing less on a quiet machine.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
