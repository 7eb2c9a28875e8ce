"""The operators of ONNX in torch: what each computes, and how a node of it becomes part of a module."""
