"""What the stages of the shipped domains are made from. A change here trains every user's models anew.

Where that is meant (a stage's VERSION was raised, a default changed), `python tests/golden/test_fingerprints.py` writes
the table again, and the diff says which stages.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from latteflow.flows.pipeline import graph
from latteflow.models.settings import SidecarSettings, VllmSettings
from latteflow.storage.artifacts import ArtifactRef
from latteflow.storage.fingerprint import fingerprint
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.stage import NotMade, StageResult, rules

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).with_suffix(".json")
SHIPPED = ("demo", "clipart", "emoji_coarse", "emoji_animals")
ALL = [
    "latteclip",
    "latteclip_plus",
    "pc_clip",
    "transduction",
    "flyp",
    "wise_ft",
    "self_training",
    "class_descriptions",
]


def fingerprints(domain: Domain, folder: Path) -> dict[str, str]:
    """Of every stage after `shard`, without the digests of images, weights, labels and earlier artifacts."""
    folder.mkdir(parents=True)
    Image.new("RGB", (32, 32), "red").save(folder / "red.png")
    (folder / "labels.csv").write_text(f'path,class\nred.png,"{domain.classes[0]}"\n')
    (folder / "texts.csv").write_text("path,text\nred.png,red\n")  # the domains' own are not in the repository
    describer, evaluation = domain.describer, domain.evaluation
    if isinstance(describer, SidecarSettings):
        describer = describer.model_copy(update={"texts": str(folder / "texts.csv")})
    assert evaluation is not None
    domain = domain.model_copy(
        update={
            "source": [str(folder)],
            "describer": describer,
            "store": str(folder.parent / "store"),
            "evaluation": evaluation.model_copy(
                update={"source": evaluation.source and [str(folder)], "labels": str(folder / "labels.csv")}
            ),
        }
    )
    found: dict[str, str] = {}
    done: dict[Any, StageResult] = {}
    for step in graph(domain):
        try:
            with rules(make=step.name == "shard"):
                done[step] = step.call(domain, done.__getitem__)
        except NotMade as missing:
            found[step.label] = fingerprint(missing.stage, missing.version, _settings(missing.inputs))
            done[step] = StageResult.of(ArtifactRef(domain.name, missing.stage, "0" * 64, "0" * 64))
    return found


def _settings(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _settings(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_settings(each) for each in value]
    return re.sub(r"\b[0-9a-f]{64}\b", "digest", value) if isinstance(value, str) else value


def domains() -> dict[str, Domain]:
    """The shipped ones, and one with every method that no language model of its own is needed for."""
    found = {name: Domain.load(ROOT / "domains" / f"{name}.yaml") for name in SHIPPED}
    asked = VllmSettings(kind="vllm", model="somebody/some-model")
    return {**found, "every method": found["demo"].model_copy(update={"method": ALL, "describer": asked})}


@pytest.mark.parametrize("name", [*SHIPPED, "every method"])
def test_stages_are_made_from_what_they_were_made_from(name: str, tmp_path: Path) -> None:
    assert fingerprints(domains()[name], tmp_path / "images") == json.loads(TABLE.read_text())[name]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        table = {name: fingerprints(domain, Path(scratch, name, "images")) for name, domain in domains().items()}
    TABLE.write_text(json.dumps(table, indent=1) + "\n")
    sys.stdout.write(f"{TABLE}: {sum(map(len, table.values()))} fingerprints\n")
