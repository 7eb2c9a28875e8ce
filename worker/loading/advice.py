"""What to send instead of a file that would run code when it is read: lines that make one which does not."""

from __future__ import annotations

from worker.vetting.pt2 import HOW_TO_EXPORT

WEIGHTS = (
    "Save its weights alone, and describe its layers in spec.architecture (or spec.config):\n"
    "from safetensors.torch import save_file\n"
    'save_file(model.state_dict(), "model.safetensors")'
)
ONNX = (
    "Export it to ONNX, the weights inside:\n"
    "shapes = ({0: torch.export.Dim.DYNAMIC},)  # the batch may vary; example: a batch of 2\n"
    'torch.onnx.export(model.eval(), (example,), "model.onnx", dynamic_shapes=shapes, external_data=False)'
)
PYTORCH = f"Any of these can be uploaded. {HOW_TO_EXPORT}\n{ONNX}\n{WEIGHTS}"
KERAS = (
    "Export it to ONNX:\n"
    'model = keras.models.load_model("model.keras")\n'
    'model.export("model.onnx", format="onnx")  # Keras 3; earlier: tf2onnx.convert.from_keras(model)'
)
TENSORFLOW = (
    "Convert it to ONNX:\n"
    "pip install tf2onnx\n"
    "python -m tf2onnx.convert --saved-model FOLDER --output model.onnx  # or --tflite FILE"
)
FORMATS = (
    "A model is its weights (.safetensors, or a state dict by torch.save) with spec.architecture or spec.config, "
    "a zip or tar of a Hugging Face folder with config.json and model.safetensors, "
    "an ONNX file with spec.task, or a program of torch.export (.pt2) with spec.task."
)
_BY_KIND = {
    "pickle": PYTORCH,
    "torchscript": PYTORCH,
    "keras": KERAS,
    "hdf5": KERAS,
    "tensorflow": TENSORFLOW,
    "tflite": TENSORFLOW,
}


def advice(kind: str) -> str:
    """What to do about a file of this kind (see `worker.vetting.sniff`)."""
    return _BY_KIND.get(kind, FORMATS)
