"""Holds real answers against the OpenAPI document: status, headers, media type, and the body by its schema."""

from __future__ import annotations

import re
from typing import Any

import httpx

# Every answer has these; they are described once, in the document's text.
COMMON = {
    "date",
    "content-length",
    "content-type",
    "x-request-id",
    "x-content-type-options",
    "transfer-encoding",
    "connection",
    "allow",
    "www-authenticate",
    "retry-after",
    "cache-control",
}
TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "null": type(None),
}


class Documented:
    """The document of one service; `seen` collects (method, path template, status)."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        self.seen: set[tuple[str, str, str]] = set()

    def operations(self) -> set[tuple[str, str]]:
        return {(method, path) for path, item in self.document["paths"].items() for method in item}

    def check(self, response: httpx.Response) -> None:
        """Fails where the answer is not what the document says; paths and methods that it does not have are errors."""
        response.read()
        method, path = response.request.method.lower(), response.request.url.path
        if path == "/openapi.json":
            return
        template = self._template(path)
        operation = self.document["paths"].get(template, {}).get(method)
        if operation is None:
            assert response.status_code in (404, 405), f"{method} {path} is not documented"
            assert response.headers["content-type"] == "application/problem+json"
            return
        status = str(response.status_code)
        assert status in operation["responses"], f"{method} {template} answered {status}: not documented"
        self.seen.add((method, template, status))
        described = operation["responses"][status]
        undocumented = set(response.headers) - COMMON - {name.lower() for name in described.get("headers", {})}
        assert not undocumented, f"{method} {template} {status}: headers {undocumented}"
        if method != "head" and status != "304":
            self._check_body(response, described)

    def _check_body(self, response: httpx.Response, described: dict[str, Any]) -> None:
        if "content-type" not in response.headers:
            assert not response.content
            assert "content" not in described, f"{response.request.method} {response.url}: a body is documented"
            return
        media = response.headers["content-type"].partition(";")[0]
        if media not in ("application/json", "application/problem+json"):
            # A binary answer has the artifact's own media type.
            assert set(described["content"]) & {media, "application/octet-stream"}
            return
        assert media in described["content"], f"{media} instead of {list(described['content'])}"
        self.validate(response.json(), described["content"][media]["schema"], str(response.request.url))

    def _template(self, path: str) -> str | None:
        if path in self.document["paths"]:
            return path
        for template in self.document["paths"]:
            if re.fullmatch(re.sub(r"\{[^}]+\}", "[^/]+", template), path):
                return str(template)
        return None

    def validate(self, value: Any, schema: dict[str, Any], where: str) -> None:
        """By the part of JSON Schema that the responses use."""
        errors = list(self._errors(value, schema))
        assert not errors, f"{where}: {errors[:3]}"

    def _errors(self, value: Any, schema: dict[str, Any], at: str = "$") -> list[str]:
        if "$ref" in schema:
            name = schema["$ref"].removeprefix("#/components/schemas/")
            return self._errors(value, self.document["components"]["schemas"][name], at)
        options = [schema[keyword] for keyword in ("anyOf", "oneOf") if keyword in schema]
        found = [f"{at} is no option" for some in options if all(self._errors(value, one, at) for one in some)]
        if "type" in schema and not _is(value, schema["type"]):
            return [f"{at} is {value!r}, not {schema['type']}"]
        if "enum" in schema and value not in schema["enum"]:
            found.append(f"{at} is {value!r}, not in {schema['enum']}")
        if "const" in schema and value != schema["const"]:
            found.append(f"{at} is {value!r}, not {schema['const']!r}")
        if isinstance(value, int | float) and not isinstance(value, bool):
            found += _bounds(value, schema, at)
        if isinstance(value, dict):
            found += self._members(value, schema, at)
        if isinstance(value, list) and "items" in schema:
            found += [e for i, item in enumerate(value) for e in self._errors(item, schema["items"], f"{at}[{i}]")]
        return found

    def _members(self, value: dict[str, Any], schema: dict[str, Any], at: str) -> list[str]:
        properties, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        found = [f"{at} lacks {name}" for name in schema.get("required", []) if name not in value]
        for name, member in value.items():
            if name in properties:
                found += self._errors(member, properties[name], f"{at}.{name}")
            elif others is False:
                found.append(f"{at}.{name} is not documented")
            elif isinstance(others, dict):
                found += self._errors(member, others, f"{at}.{name}")
        return found


def _is(value: Any, wanted: str) -> bool:
    if wanted == "integer":
        return isinstance(value, int) and not isinstance(value, bool)
    if wanted == "number":
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, TYPES[wanted])


def _bounds(value: float, schema: dict[str, Any], at: str) -> list[str]:
    holds = {
        "minimum": lambda bound: value >= bound,
        "maximum": lambda bound: value <= bound,
        "exclusiveMinimum": lambda bound: value > bound,
        "exclusiveMaximum": lambda bound: value < bound,
    }
    return [
        f"{at} is {value}: {name} {schema[name]}"
        for name, test in holds.items()
        if name in schema and not test(schema[name])
    ]
