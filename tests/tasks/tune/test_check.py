"""What is wrong with the models of a domain file is said by `plan`, and by `run` before any stage."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from latteflow.flows.pipeline import run_plainly
from latteflow.flows.plan import plan
from latteflow.models.errors import ModelError
from latteflow.models.settings import NeighbourSettings
from latteflow.models.towers import clip, neighbours
from latteflow.storage.errors import DataError
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.ingest.embed import embed
from latteflow.tasks.ingest.shard import shard
from latteflow.tasks.tune.check import check_models


def with_line(path: Path, name: str, line: str) -> Domain:
    """The domain of the fixture with another line for one of its keys."""
    file = path / "domain.yaml"
    kept = [each for each in file.read_text().splitlines() if not each.startswith(f"{name}:")]
    file.write_text("\n".join([*kept, line]) + "\n")
    return Domain.load(file)


def refused(domain: Domain, tmp_path: Path) -> str:
    """What `plan` and `run` say, the same; nothing was made."""
    said = []
    for command in (plan, run_plainly):
        with pytest.raises((ModelError, DataError)) as caught:
            command(domain)
        said.append(str(caught.value))
    assert said[0] == said[1] and not (tmp_path / "store").exists()
    return said[0]


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("clip", "clip: {model: ViT-B32, pretrained: openai}", "did you mean ViT-B-32"),
        ("clip", "clip: {model: ViT-B-32, pretrained: laion3b}", "'laion3b' names no weights of ViT-B-32"),
        ("clip", "clip: {model: ./nothing}", "there is no such folder"),
        ("clip", "clip: {model: nothing}", "nor a folder with open_clip_config.json"),
        ("clip", "clip: {model: ./train}", "open_clip_config.json of the folder cannot be loaded (FileNotFoundError"),
        (
            "describer",
            "describer: {kind: vllm, model: ./nothing}",
            "does not exist or is empty; check `describer.model`",
        ),
        ("describer", "describer: {kind: sidecar, texts: nothing.csv}", "nothing.csv' does not exist"),
        ("method", "method: clamp\nclamp: {lm: ./nothing}", "there is no such folder"),
        (
            "method",
            "method: pc_clip\npairs: {describer: {kind: vllm, model: ./nothing}}",
            "does not exist or is empty; check `describer.model`",
        ),
    ],
)
def test_what_cannot_be_had_is_said_before_any_stage(
    domain: Domain, tmp_path: Path, name: str, line: str, message: str
) -> None:
    assert message in refused(with_line(tmp_path, name, line), tmp_path)


def test_a_model_folder_beside_the_domain_file_needs_no_dot(domain: Domain, tmp_path: Path, tiny_clip: Path) -> None:
    shutil.copytree(tiny_clip, tmp_path / "vit")
    found = with_line(tmp_path, "clip", "clip: {model: vit}")
    assert found.clip.model == str(tmp_path / "vit")
    clip.check(found.clip)
    # A folder of results that is called as a model is not the model.
    (tmp_path / "ViT-B-32").mkdir()
    (tmp_path / "weights.pt").touch()
    found = with_line(tmp_path, "clip", "clip: {model: ViT-B-32, pretrained: weights.pt}")
    assert (found.clip.model, found.clip.pretrained) == ("ViT-B-32", str(tmp_path / "weights.pt"))


def test_other_model_folders_beside_the_domain_file_need_none_either(domain: Domain, tmp_path: Path) -> None:
    for name in ("lm", "vlm"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    with_line(tmp_path, "describer", "describer: {kind: vllm, model: vlm}")
    found = with_line(tmp_path, "clamp", "clamp: {lm: lm}")
    assert (found.clamp.lm, found.describer.model) == (str(tmp_path / "lm"), str(tmp_path / "vlm"))  # type: ignore[union-attr]


def make_timm_clip(folder: Path, size: int) -> None:
    """An open_clip folder with a timm tower for 160 x 160 pixels, which says that it takes ``size``."""
    import open_clip

    config = {
        "embed_dim": 32,
        "vision_cfg": {"timm_model_name": "test_vit3", "timm_pool": "avg", "timm_proj": "linear", "image_size": size},
        "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    model = open_clip.CLIP(**config)
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))


def test_an_image_size_that_a_timm_tower_does_not_take_is_said_before_any_stage(domain: Domain, tmp_path: Path) -> None:
    make_timm_clip(tmp_path / "other", 64)
    message = refused(with_line(tmp_path, "clip", "clip: {model: other}"), tmp_path)
    assert "images of 64 x 64 pixels" in message and "test_vit3, takes 160 x 160" in message
    make_timm_clip(tmp_path / "own", 160)
    model = clip.read(with_line(tmp_path, "clip", "clip: {model: own}").clip)
    assert model.image_embeds(torch.zeros(1, 3, 160, 160)).shape == (1, 32)


def test_a_model_that_embedded_the_domain_is_not_looked_at_again(
    domain: Domain, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_plainly(domain)
    monkeypatch.setattr(clip, "check", lambda settings: pytest.fail("the seconds that open_clip takes"))
    assert all(each.cached for each in run_plainly(domain))
    assert not any(each.reasons for each in plan(domain))


def test_a_second_tower_that_has_embedded_is_not_looked_at_again(
    domain: Domain, tiny_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = domain.model_copy(update={"neighbours": NeighbourSettings(model=str(tiny_clip))})
    looked: list[NeighbourSettings] = []
    monkeypatch.setattr(neighbours, "check", looked.append)
    check_models(named)
    assert looked == [named.neighbours]
    embed(named, shard(named, "train"))
    check_models(named)
    assert len(looked) == 1
