"""The OpenAPI document tells the truth: every operation is called, and every answer is as described."""

from __future__ import annotations

import hashlib
from typing import Any

from app.contract.spec import JobSpec
from tests.app.service import STEPS, Service
from tests.app.uploads.resumable import OCTETS, VERSION, create

NOBODY = "0" * 26


def walk(service: Service) -> None:
    """Calls every operation, well and badly; the client's hook holds each answer against the document."""
    http = service.http
    job = service.finished()
    artifact = f"/v1/jobs/{job}/artifacts/model.onnx"
    upload = create(http, 6)
    tag = http.get(artifact).headers["etag"]
    calls: list[tuple[str, str, dict[str, Any]]] = [
        ("POST", "/v1/models", {"content": b""}),
        ("POST", "/v1/models", {"json": {}}),
        ("POST", "/v1/models?spec=[]", {"content": b"x"}),
        ("GET", f"/v1/models/{service.model()}", {}),
        ("GET", f"/v1/models/mdl_{NOBODY}", {}),
        ("GET", "/v1/models", {}),
        ("GET", "/v1/models?limit=0", {}),
        ("POST", "/v1/datasets", {"content": b""}),
        ("GET", f"/v1/datasets/{service.dataset()}", {}),
        ("GET", f"/v1/datasets/dst_{NOBODY}", {}),
        ("GET", "/v1/datasets", {}),
        ("OPTIONS", "/v1/uploads", {}),
        ("POST", "/v1/uploads", {"headers": VERSION | {"Upload-Length": "9"}}),
        ("POST", "/v1/uploads", {"headers": {"Upload-Length": "9"}}),
        ("GET", "/v1/uploads", {}),
        ("GET", "/v1/uploads?sha256=x", {}),
        ("HEAD", upload, {"headers": VERSION}),
        ("GET", upload, {}),
        ("PATCH", upload, {"headers": OCTETS | {"Upload-Offset": "0"}, "content": b"123456"}),
        ("PATCH", upload, {"headers": OCTETS | {"Upload-Offset": "3"}}),
        ("DELETE", upload, {"headers": VERSION}),
        ("DELETE", upload, {"headers": VERSION}),
        ("HEAD", f"/v1/blobs/sha256:{hashlib.sha256(b'weights').hexdigest()}", {}),
        ("HEAD", "/v1/blobs/nonsense", {}),
        ("POST", "/v1/jobs", {"json": {"model": service.model(), "steps": STEPS}}),
        ("POST", "/v1/jobs", {"json": {}}),
        ("POST", "/v1/jobs", {"content": b"{"}),
        ("GET", "/v1/jobs", {}),
        ("GET", f"/v1/jobs/{job}", {}),
        ("GET", f"/v1/jobs/job_{NOBODY}", {}),
        ("POST", f"/v1/jobs/{job}/cancel", {}),
        ("POST", f"/v1/jobs/{service.job()['id']}/cancel", {}),
        ("GET", f"/v1/jobs/{job}/report", {}),
        ("GET", f"/v1/jobs/{job}/report/sensitivity.svg", {}),
        ("GET", f"/v1/jobs/job_{NOBODY}/report/sensitivity.svg", {}),
        ("GET", f"/v1/jobs/{job}/artifacts", {}),
        ("GET", artifact, {"headers": {"Range": "bytes=0-1"}}),
        ("GET", artifact, {"headers": {"Range": "bytes=99999999-"}}),
        ("GET", artifact, {"headers": {"If-None-Match": tag}}),
        ("HEAD", artifact, {}),
        ("GET", "/v1/techniques", {}),
        ("GET", "/v1/recipes", {}),
        ("GET", "/healthz", {}),
        ("GET", "/readyz", {}),
        ("GET", "/metrics", {}),
    ]
    for method, path, request in calls:
        assert http.request(method, path, **request).status_code < 500 or path == "/readyz"


def test_every_documented_operation_is_exercised(service: Service) -> None:
    service.documented.seen.clear()
    walk(service)
    assert {(method, path) for method, path, _ in service.documented.seen} == service.documented.operations()


def test_techniques_carry_the_schema_of_their_step(service: Service) -> None:
    found = {item["name"]: item for item in service.http.get("/v1/techniques").json()}
    assert set(found) == {"prune", "finetune", "distill", "quantize", "compress", "factorize", "resize", "fuse"}
    kinds = found["prune"]["schema"]["$defs"]
    assert kinds["Prune"]["properties"]["sparsity"]
    assert kinds["StructuredPrune"]["properties"]["round_to"]
    assert found["resize"]["schema"]["$defs"]["ResizeWidth"]["properties"]["multiplier"]
    assert found["quantize"]["may_not_follow"] == ["quantize"]
    recipes = {item["name"]: item for item in service.http.get("/v1/recipes").json()}
    assert set(recipes) >= {"int8", "sparse", "small"}
    for recipe in recipes.values():
        JobSpec.model_validate({"model": f"mdl_{NOBODY}", "steps": recipe["steps"]})


def test_bodies_security_and_references(service: Service, guarded: Service) -> None:
    document = service.documented.document
    upload = document["paths"]["/v1/models"]["post"]
    ways = {"application/octet-stream", "multipart/form-data", "application/json"}
    assert set(upload["requestBody"]["content"]) == ways
    assert {parameter["name"] for parameter in upload["parameters"]} >= {"filename", "spec", "Prefer", "Repr-Digest"}
    append = document["paths"]["/v1/uploads/{upload_id}"]["patch"]
    assert {parameter["name"] for parameter in append["parameters"] if parameter["required"]} >= {
        "Tus-Resumable",
        "Upload-Offset",
    }
    assert {"204", "409", "412", "415", "423", "460"} <= set(append["responses"])
    submit = document["paths"]["/v1/jobs"]["post"]
    assert {"Location", "Retry-After", "ETag"} <= set(submit["responses"]["202"]["headers"])
    example = submit["requestBody"]["content"]["application/json"]["example"]
    JobSpec.model_validate(example)
    assert {} in upload["security"]  # no key is needed here …
    assert guarded.documented.document["paths"]["/v1/jobs"]["post"]["security"] == [{"key": []}]  # … but there
    assert "security" not in document["paths"]["/healthz"]["get"]
    assert "HTTPValidationError" not in str(document)
    for reference in _references(document):
        here: Any = document
        for part in reference.removeprefix("#/").split("/"):
            here = here[part]


def _references(node: Any) -> list[str]:
    if isinstance(node, dict):
        own = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
        return own + [found for value in node.values() for found in _references(value)]
    return [found for value in node for found in _references(value)] if isinstance(node, list) else []
