"""Our zero-shot figures are those of open_clip's own classification code, with its own loading and transform."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image

from latteflow.flows.pipeline import run_plainly
from latteflow.tasks.core.domain import Domain

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("templates", [["a {} shape."], ["a {} shape.", "a photo of something {}.", "{}"]])
def test_zero_shot_is_what_open_clip_says(
    domain: Domain, tmp_path: Path, tiny_clip: Path, templates: list[str]
) -> None:
    clip = domain.clip.model_copy(update={"resize": "crop"})
    run_plainly(domain.model_copy(update={"clip": clip, "templates": templates}))
    metrics = json.loads((Path(domain.output) / "shapes" / "metrics.json").read_text())

    name = f"local-dir:{tiny_clip}"
    model, _, transform = open_clip.create_model_and_transforms(name)
    model.eval()
    with torch.no_grad():
        weights = open_clip.build_zero_shot_classifier(
            model, open_clip.get_tokenizer(name), domain.classes, [template.format for template in templates]
        )
        rows = [line.split(",") for line in (tmp_path / "labels.csv").read_text().splitlines()[1:]]
        pixels = torch.stack([transform(Image.open(tmp_path / path)) for path, _ in rows])
        logits = 100 * model.encode_image(pixels, normalize=True) @ weights
    truth = torch.tensor([domain.classes.index(label) for _, label in rows])
    score = metrics["zero_shot"]["methods"]["zero_shot_plain"]
    assert score["top1"] == pytest.approx(float((logits.argmax(1) == truth).double().mean()))
    for number in range(3):
        own = truth == number
        theirs = float((logits.argmax(1) == truth)[own].double().mean())
        assert score["per_class"][str(number)]["top1"] == pytest.approx(theirs)
