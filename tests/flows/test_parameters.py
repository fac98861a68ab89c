"""What a deployment is told, and what it says of a mistake before a run begins; what is sent to nobody."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import ValidationError, validate
from ruamel.yaml import YAML

from latteflow.flows.adapt import adapt

GIVEN = {"name": "birds", "source": "/birds", "classes": ["robin", "wren"]}
GENERAL = {"source": "/g", "labels": "/g.csv", "classes": ["car", "bus"]}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({**GIVEN, "sorce": "x"}, "'domain'. Failure reason: Additional properties are not allowed ('sorce'"),
        ({"name": "b", "sorce": "/b", "classes": ["a", "b"]}, "not allowed ('sorce'"),
        ({**GIVEN, "latteclip": {"epoch": 2}}, "'domain.latteclip'. Failure reason: Additional properties"),
        ({**GIVEN, "evaluation": {"lables": "x"}}, "not allowed ('lables'"),
        ({**GIVEN, "evaluation": {"labels": "l", "general": {**GENERAL, "lables": "x"}}}, "not allowed ('lables'"),
        (
            {**GIVEN, "describer": {"kind": "vlm"}},
            "'domain.describer.kind'. Failure reason: 'vlm' is not one of ['tags'",
        ),
        ({**GIVEN, "describer": {"kind": "vllm", "model": "m", "modle": "x"}}, "not allowed ('modle'"),
        ({**GIVEN, "pairs": {"describer": {"kind": "vllm", "model": "m", "modle": "x"}}}, "not allowed ('modle'"),
        ({**GIVEN, "seeds": "x"}, "'domain.seeds'. Failure reason: 'x' is not of type 'array'"),
        (3, "'domain'. Failure reason: 3 is not of type 'object', 'string'"),
        ("birds.yaml", ""),
        (GIVEN, ""),
        ({**GIVEN, "source": ["/a", "/b"], "method": "pc_clip", "describer": {"kind": "tags"}, "evaluation": None}, ""),
    ],
)
def test_a_wrong_key_in_json_is_named_before_a_run(given: Any, told: str) -> None:
    schema = parameter_schema(adapt).model_dump_for_openapi()
    try:
        validate({"domain": given}, schema, raise_on_error=True)
        said = ""
    except ValidationError as error:
        said = str(error)
    assert told in said and bool(told) == bool(said)


def test_nothing_that_we_ship_sends_figures_of_its_use() -> None:
    root = Path(__file__).parents[2]
    ask = "from prefect.settings import get_current_settings as now; print(now().server.analytics_enabled)"
    plain = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    done = subprocess.run([sys.executable, "-c", ask], cwd=root, env=plain, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    for file in ("prefect.yaml", "deploy/docker.yaml", "deploy/kubernetes.yaml"):
        found = YAML(typ="safe").load(root / file)
        assert all(each["work_pool"]["job_variables"]["env"]["DO_NOT_TRACK"] == "1" for each in found["deployments"])
