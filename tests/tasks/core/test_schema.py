"""The JSON schema of domain files, by a validator that others use."""

from pathlib import Path
from typing import Any

import jsonschema
import pytest
from ruamel.yaml import YAML

from latteflow.models.methods.registry import METHODS
from latteflow.tasks.core.schema import schema

SHIPPED = sorted(Path("domains").absolute().glob("*.yaml"))


def mistakes(raw: Any) -> list[str]:
    return [error.message for error in jsonschema.Draft202012Validator(schema()).iter_errors(raw)]


def test_it_is_a_schema_that_describes_every_key() -> None:
    found = schema()
    jsonschema.Draft202012Validator.check_schema(found)
    for name, field in found["properties"].items():
        kind = found["$defs"][field["$ref"].rsplit("/", 1)[1]] if "$ref" in field else {}
        assert "description" in {**kind, **field}, name


@pytest.mark.parametrize("file", SHIPPED, ids=lambda path: path.stem)
def test_the_shipped_domains_are_valid(file: Path) -> None:
    assert mistakes(YAML(typ="safe").load(file.read_text())) == []


@pytest.mark.parametrize(
    "more",
    [
        {"sorce": "photos"},
        {"classes": ["robin"]},
        {"classes": 3},
        {"method": "lateclip"},
        {"describer": {"kind": "vlm"}},
        {"describer": {"kind": "vllm", "model": "m", "url": "http://127.0.0.1"}},
        {"shard": {"images": 0}},
        {"seeds": []},
    ],
)
def test_mistakes_are_found(more: dict[str, Any]) -> None:
    assert mistakes({"name": "birds", "source": "photos", "classes": ["robin", "wren"], **more})


@pytest.mark.parametrize(
    "more",
    [
        {"method": list(METHODS)},
        {"method": "clamp"},
        {"source": ["a", "b"]},
        {"classes": "names.txt"},
        {"describer": {"kind": "openai", "model": "m", "url": "http://127.0.0.1:8000/v1", "extra": {"top_p": 0.5}}},
        {"shard": {"grey_range": [0, 4095]}},
        {"evaluation": {"labels": "a.csv", "general": {"source": "a", "labels": "b.csv", "classes": "names.txt"}}},
        {"pairs": {"describer": None}},
    ],
)
def test_what_a_domain_may_say_is_valid(more: dict[str, Any]) -> None:
    assert mistakes({"name": "birds", "source": "photos", "classes": ["robin", "wren"], **more}) == []
