"""Everything that imports torch. Of `app` it imports `app.contract` and `app.settings` alone."""

import os

# Read when onnxruntime is imported: it would keep a database at home and send word of every session to its maker.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
