"""CLAMP in a run: trained from the store, scored like any method, exported and loaded again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import tinylm
from latteflow.flows.pipeline import run_plainly
from latteflow.models.errors import ModelError
from latteflow.models.methods.clamp import ClampSettings, adapter, lm
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.errors import ConfigError
from latteflow.tasks.core.stage import StageResult, open_store, statistic
from latteflow.tasks.ship.export import export_tuned
from latteflow.tasks.tune.models import read_history, read_tuned

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tinylm.save(tmp_path_factory.mktemp("lm"))


@pytest.fixture
def clamped(domain: Domain, folder: Path) -> Domain:
    settings = ClampSettings(lm=str(folder), prompts=4, batch_size=8, steps=12, lr=5e-3)
    return domain.model_copy(update={"method": ["clamp", "latteclip"], "clamp": settings})


def told(domain: Domain, **changes: Any) -> Domain:
    return domain.model_copy(update={"clamp": domain.clamp.model_copy(update=changes)})


def run(domain: Domain) -> dict[str, StageResult]:
    return {result.label: result for result in run_plainly(domain)}


def trained(domain: Domain) -> int:
    store, result = open_store(domain), run(domain)["tune"]
    return 0 if result.cached else int(statistic(store, store.open(result.ref), "parts_made") or 0)


def test_a_run_with_clamp(clamped: Domain, tmp_path: Path) -> None:
    results = run(clamped)
    artifact = open_store(clamped).open(results["tune"].ref)
    metrics = json.loads((Path(clamped.output) / "shapes" / "metrics.json").read_text())
    assert list(metrics["methods"]) == ["clamp", "latteclip"] and len(metrics["methods"]["clamp"]["seeds"]) == 2
    assert "<bdi>CLAMP</bdi>" in (Path(clamped.output) / "shapes" / "report.html").read_text()
    history = read_history(artifact, "clamp", 0)
    assert history[-1]["step"] == 12 and history[-1]["loss"] < history[0]["loss"]

    names = [clamped.prompt_name(name) for name in clamped.classes]
    found, tower = (
        read_tuned(artifact, "clamp", 1),
        adapter.unpack(artifact.read("clamp.seed-1.adapter.safetensors"), clamped.clamp.lm),
    )
    np.testing.assert_allclose(tower.text_features(names).numpy(), found.prototypes, atol=1e-6)
    assert not np.allclose(found.prototypes, read_tuned(artifact, "clamp", 0).prototypes, atol=1e-2)

    export_tuned(clamped, results["tune"], 1, tmp_path / "model")
    head = load_file(tmp_path / "model" / "classifier.safetensors")
    data = (tmp_path / "model" / "clamp.safetensors").read_bytes()
    again = adapter.unpack(data, clamped.clamp.lm)
    np.testing.assert_allclose(again.text_features(names).numpy(), head["prototypes"].numpy(), atol=1e-6)
    assert adapter.pack(again) == data
    assert b"embed_tokens" not in data and str(clamped.clamp.lm).encode() not in data


def test_a_change_trains_only_what_it_shapes(clamped: Domain, tmp_path: Path) -> None:
    assert trained(clamped) == 4
    assert trained(told(clamped, cache_gb=0.1)) == 0
    other = tinylm.save(tmp_path / "same")
    assert trained(told(clamped, lm=str(other))) == 0  # the same bytes in another place
    assert trained(told(clamped, lm=str(tinylm.save(tmp_path / "gemma", "gemma3")))) == 2
    assert trained(told(clamped, steps=13)) == 2
    latteclip = clamped.latteclip.model_copy(update={"alpha": 0.2})
    assert trained(clamped.model_copy(update={"latteclip": latteclip})) == 2


def test_latteclip_reads_its_texts_with_the_language_model(clamped: Domain) -> None:
    own = read_tuned(open_store(clamped).open(run(clamped)["tune"].ref), "latteclip", 1)
    settings = clamped.latteclip.model_copy(update={"texts_from": "clamp", "train": "prototypes", "alpha": 0.0})
    domain = clamped.model_copy(update={"latteclip": settings})
    artifact = open_store(domain).open(run(domain)["tune"].ref)
    read = read_tuned(artifact, "latteclip", 1)
    tower = adapter.unpack(artifact.read("clamp.seed-1.adapter.safetensors"), domain.clamp.lm)
    first = tower.text_features([text for texts in domain.prompts() for text in texts]).numpy()
    np.testing.assert_allclose(read.prototypes, first, atol=1e-5)  # without texts in the targets, they stay there
    assert abs(read.prototypes - own.prototypes).max() > 0.01
    assert trained(domain) == 0 and trained(told(domain, steps=13)) == 4


def test_an_adapter_knows_its_language_model(clamped: Domain, tmp_path: Path) -> None:
    tower = lora_tower(clamped)
    data = adapter.pack(tower)
    assert adapter.unpack(data, clamped.clamp.lm).text_features(["red"]).equal(tower.text_features(["red"]))
    with pytest.raises(ModelError, match="was a folder; say where it is"):
        adapter.unpack(data)
    with pytest.raises(ModelError, match="belongs to the language model"):
        adapter.unpack(data, str(tinylm.save(tmp_path / "gemma", "gemma3")))
    for wrong in (b"", b"\x10\0\0\0\0\0\0\0{}              ", data.replace(b'"schema', b'"schemo')):
        with pytest.raises(ModelError, match="not the adapter of a CLAMP tower"):
            adapter.unpack(wrong, clamped.clamp.lm)


def lora_tower(domain: Domain) -> Any:
    from latteflow.models.methods.clamp.tower import ClampTower

    settings = domain.clamp.model_copy(update={"lora_rank": 2})
    tower = ClampTower(*lm.load(settings), settings, 32)
    for name, tensor in tower.adapter().items():
        tensor += 0.01 * torch.randn(tensor.shape) * (name != "log_scale")
    return tower.eval()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("method: clamp", "clamp needs a language model: `clamp: {lm: NAME}`"),
        ("clamp: {lm: embedded, batch_size: 1}", "`clamp.batch_size` .*greater than or equal to 2"),
        ("clamp: {lora: 4}", "unknown key; did you mean `lora_"),
        ("method: [latteclip]\nlatteclip: {texts_from: clamp}", "add clamp to `method`"),
        (
            "method: [clamp, latteclip]\nclamp: {lm: embedded}\nlatteclip: {texts_from: clamp, train: all}",
            "add `latteclip: {text_tower: frozen}`",
        ),
    ],
)
def test_what_cannot_run_is_told_before(tmp_path: Path, lines: str, message: str) -> None:
    (tmp_path / "domain.yaml").write_text(f"name: x\nsource: a\nclasses: [a, b]\n{lines}\n")
    with pytest.raises(ConfigError, match=message):
        Domain.load(tmp_path / "domain.yaml")


def test_a_language_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no such folder"):
        lm.identity(ClampSettings(lm=str(tmp_path / "none")))
    with pytest.raises(ModelError, match="needs a language model"):
        lm.identity(ClampSettings())
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="cannot be loaded"):
        lm.load(ClampSettings(lm=str(tmp_path / "empty")))


def test_half_precision_on_a_cpu_is_told(clamped: Domain) -> None:
    with pytest.raises(ModelError, match="float16 overflows"):
        run(told(clamped, dtype="float16"))
