"""Checks requests against Google's own description of Vertex AI's REST interface."""

from __future__ import annotations

import functools
import importlib.util
import json
import pathlib
import re
from typing import Any

_PREFIX = "GoogleCloudAiplatformV1"
_KINDS: dict[str, Any] = {
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
    "object": dict,
    "array": list,
}


@functools.cache
def document() -> dict[str, Any]:
    """The discovery document that google-api-python-client carries."""
    package = importlib.util.find_spec("googleapiclient")
    assert package is not None and package.origin is not None
    folder = pathlib.Path(package.origin).parent / "discovery_cache" / "documents"
    found: dict[str, Any] = json.loads((folder / "aiplatform.v1.json").read_text())
    return found


def problems(value: Any, schema: str = "CustomJob") -> list[str]:
    """What a request body has against its schema, one text each."""
    return list(_object(value, _PREFIX + schema, schema))


def _object(value: Any, schema: str, where: str) -> list[str]:
    if not isinstance(value, dict):
        return [f"{where} is no object"]
    properties = document()["schemas"][schema].get("properties", {})
    found = []
    for key, item in value.items():
        if key not in properties:
            found.append(f"{where} has no field {key}")
        elif properties[key].get("readOnly"):
            found.append(f"{where}.{key} is for output only")
        else:
            found += _value(item, properties[key], f"{where}.{key}")
    for key, description in properties.items():
        required = description.get("description", "").startswith("Required.")
        if required and not value.get(key):
            found.append(f"{where}.{key} is missing")
    return found


def _value(value: Any, schema: dict[str, Any], where: str) -> list[str]:
    if "$ref" in schema:
        return _object(value, schema["$ref"], where)
    kind = schema.get("type", "any")
    if kind == "any":
        return []
    if not isinstance(value, _KINDS[kind]) or (kind != "boolean" and isinstance(value, bool)):
        return [f"{where} = {value!r} is no {kind}"]
    if kind == "array":
        return [
            text
            for number, item in enumerate(value)
            for text in _value(item, schema["items"], f"{where}[{number}]")
        ]
    if kind == "object":
        each = schema.get("additionalProperties", {})
        return [text for key in value for text in _value(value[key], each, f"{where}.{key}")]
    return _text(value, schema, where) if kind == "string" else []


def _text(value: str, schema: dict[str, Any], where: str) -> list[str]:
    if "enum" in schema and value not in schema["enum"]:
        return [f"{where} = {value!r} is none of {', '.join(schema['enum'])}"]
    pattern = {"int64": r"-?\d+", "google-duration": r"\d+(\.\d+)?s"}.get(schema.get("format", ""))
    if pattern and not re.fullmatch(pattern, value):
        return [f"{where} = {value!r} is no {schema['format']}"]
    return []
