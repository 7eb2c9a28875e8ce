"""Static int8: ranges of activations, rounding of weights, in a float ONNX graph."""
