"""The choice between two kinds of int8, over HTTP."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.acceptance.conftest import Service
from tests.acceptance.jobs import run
from tests.acceptance.test_huggingface import BAD, GOOD, bert

__all__ = ["bert"]  # a fixture

pytestmark = pytest.mark.slow


def test_of_a_transformer_two_files_are_made_and_one_is_delivered(tersor: Service, bert: Path, tmp_path: Path) -> None:
    rows = [{"text": text, "label": label} for label, texts in (("good", GOOD), ("bad", BAD)) for text in texts]
    lines = [row | {"split": split} for split in ("calibration", "test") for row in rows]
    (tmp_path / "films.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with tersor.client() as client:
        model = client.upload_model(bert)["id"]
        dataset = client.upload_dataset(tmp_path / "films.jsonl")["id"]
        done, report = run(client, model, dataset, steps=[{"technique": "quantize", "method": "auto"}], export=["onnx"])
        client.download(done["id"], "model.onnx", tmp_path)
    (artifact,) = report["artifacts"]
    assert "Dynamic int8 is tried besides" in report["steps"][0]["details"]["why"]
    assert {row["method"] for row in artifact["details"]["methods"]} == {"static", "dynamic"}
    assert artifact["details"]["method"] in ("static", "dynamic")
    assert artifact["details"]["why"]
