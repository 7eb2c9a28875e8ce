"""The user's side of `tersor demo`: plain torch and onnxruntime, without any of Tersor's code."""
