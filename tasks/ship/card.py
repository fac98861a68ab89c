"""Cards: what is in a folder that leaves the house, in Markdown that model and data hubs read.

Names from outside appear as JSON strings in code, where nothing in them is markup.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latteflow.models.judge.metrics import seen_note
from latteflow.models.methods.registry import METHODS, label
from latteflow.models.settings import ZERO_SHOT, own_zero_shot
from latteflow.storage.artifacts import Artifact
from latteflow.tasks.core.domain import Domain

if TYPE_CHECKING:
    import polars as pl

    from latteflow.tasks.report.scores import Score, Scores

_USE = """\
## Use
```python
from PIL import Image
import latteflow
model = latteflow.load_model(".")  # this folder
answers = model.predict([Image.open("photo.jpg")])
print(model.classes[answers.labels[0]], answers.probabilities[0, 0])
```
`latteflow predict . IMAGES --out predictions.parquet` does a folder or bucket,
`latteflow serve .` a small web service."""
_ZERO_SHOT = "not at all: the classifier is the text tower's reading of the class names"


def model_card(
    domain: Domain,
    *,
    method: str,
    seed: int | None,
    lineage: Mapping[str, Artifact],
    verdict: str,
    scores: Scores | None,
    artifacts: Mapping[str, str],
    parity: Mapping[str, float],
    formats: Sequence[str],
    temperature: float,
    unknown: str,
) -> str:
    """The README.md of an exported model.

    Args:
        lineage: the artifacts that it was made from, by stage.
        verdict: of the gate without labels; empty if it was not asked.
        scores: of the run; None where it was not evaluated.
        artifacts: fingerprints of further stages.
        parity: how far other readers of the model differ, by their name.
        formats: beside the folder's own.
        temperature: what its logits are divided by.
        unknown: how images of none of the classes are told, or why they are not.
    """
    base = ", ".join(_public(name) for name in (domain.clip.model, domain.clip.pretrained) if name)
    how = _ZERO_SHOT if method == ZERO_SHOT else METHODS[method].how
    adapted = how + ("" if seed is None else f"; seed {seed}")
    if method == ZERO_SHOT:
        adapted += f" ({label(own_zero_shot(domain.clip.centre))})"
    fingerprints = {stage: artifact.fingerprint for stage, artifact in lineage.items()} | dict(artifacts)
    counts = lineage["shard"].counts
    gate = f"The gate, which reads no label: {verdict}." if verdict else "The gate was not asked about this model."
    return f"""\
---
library_name: open_clip
pipeline_tag: image-classification
license: other
license_name: as-the-base-model
tags: [clip, image-classification, latteflow]
---
# {_code(domain.name)}: a CLIP classifier adapted without labels

| | |
| --- | --- |
| base model | {_code(base)} |
| adapted by | {adapted} |
| texts by | {_code(_describer(domain)) if lineage.keys() & {"screen", "pair"} else "none were read"} |
| images | {counts["images"]:,} without labels, {counts["quarantined"]:,} in quarantine |
{_texts(lineage)}| pictures | {_RESIZE[domain.clip.resize]} |
| classes | {len(domain.classes)}, listed below |

## Accuracy
{_accuracy(method, seed, scores)}

{gate}

{_use(method, domain, formats)}

{_limits(unknown, temperature)}
## Checked at export
| against | largest difference |
| --- | --- |
{_rows(f"{name} | {value:.1e}" for name, value in parity.items())}
Differences are of probabilities, unless they say otherwise.

## Lineage
| stage | fingerprint |
| --- | --- |
{_rows(f"{stage} | `{digest[:16]}`" for stage, digest in fingerprints.items())}
## Classes
{_listed(domain.classes)}
"""


def _limits(unknown: str, temperature: float) -> str:
    return f"""\
## Limits
- It answers one of its classes for every image. Images of none of them: {unknown}. Where there is a mark, it catches
  some images of other kinds, not all, and some images of the domain.
- No label took part. For probabilities that are about as often right as they say, logits are divided by the temperature
  {temperature:.3g} before the softmax; `latteflow` does so. It was estimated without labels and may be off.
- The licence is that of the base model's weights, of the language model that wrote the texts, if there was one, and of
  the images. Nobody has checked them for your use.
"""


def caption_card(domain: Domain, tables: Mapping[str, pl.DataFrame], fingerprints: Mapping[str, str]) -> str:
    """The README.md of exported texts, by whose header Hugging Face ``datasets`` finds the tables."""
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.parquet\n" for name in tables)
    models = sorted({f"{_public(model)} {(revision or '')[:12]}".strip() for t in tables.values()
                     for model, revision in t.select("model", "revision").unique().iter_rows()})  # fmt: skip
    return f"""\
---
license: other
license_name: as-the-images-and-the-model
task_categories: [image-to-text]
configs:
{configs}---
# {_code(domain.name)}: texts about unlabelled images

Written for adapting a CLIP, by {", ".join(map(_code, models))}. Nobody has read them all: they are what a model
said, and may be wrong, repeat a bias, or name what is not there. No label is among them, and no picture.

| table | rows | one row is |
| --- | --- | --- |
{_rows(f"`{name}` | {table.height:,} | {_KINDS[name]}" for name, table in tables.items())}
```python
import datasets
texts = datasets.load_dataset("FOLDER", "images", split="train")
```

| column | |
| --- | --- |
| `paths`, `keys` | of the images in the source, and as latteflow calls them |
| `text` | what was said; null where the model could not answer, `detail` then says why |
| `prompt`, `prompt_id`, `sampling` | the question, its pack, and how the answer was drawn (JSON) |
| `model`, `revision`, `engine` | who said it |
| `finish_reason`, `prompt_tokens`, `output_tokens` | how the answer ended, and its length |
| `flags`, `weight` | of the screen: what is wrong with the text, and what it counts in training (0: not used) |
| `class` | in `images` and `groups`: the *guess* of the untouched CLIP; in `classes`: the class the text is about |

The licence is that of the images and of the model that wrote.

| stage | fingerprint |
| --- | --- |
{_rows(f"{stage} | `{digest[:16]}`" for stage, digest in fingerprints.items())}"""


_KINDS = {
    "images": "a text about an image",
    "groups": "a text about some images that look alike",
    "classes": "a text about a class name",
    "pairs": "a text about how two images differ",
}
_RESIZE = {
    "crop": "scaled to the short side, the middle is read",
    "pad": "whole, in the middle of a white square",
}


def _code(text: str) -> str:
    """A text from outside, as code in one line of a table."""
    quoted = json.dumps(text, ensure_ascii=False)[1:-1].replace('\\"', '"')
    return f"`{quoted.replace('`', chr(0x2CB)).replace('|', chr(0x2223))}`"


def _listed(names: Sequence[str]) -> str:
    # An indented block of JSON strings: a line break in a name is an escape, so nothing leaves the block.
    return "\n".join(f"    {json.dumps(name, ensure_ascii=False)}" for name in names)


def _rows(rows: Any) -> str:
    return "".join(f"| {row} |\n" for row in rows)


def _describer(domain: Domain) -> str:
    model = getattr(domain.describer, "model", None)
    return domain.describer.kind if model is None else f"{domain.describer.kind}, {_public(model)}"


def _public(name: str) -> str:
    """The name of a model; of a folder of this machine the last part."""
    return Path(name).name if name.startswith("/") else name


def _texts(lineage: Mapping[str, Artifact]) -> str:
    if "screen" not in lineage:
        return ""
    parts = [part.counts for part in lineage["screen"].parts]
    texts, dropped = (sum(counts.get(name, 0) for counts in parts) for name in ("texts", "dropped"))
    return f"| texts | {texts:,}, of which {dropped:,} were not used |\n"


def _accuracy(method: str, seed: int | None, scores: Scores | None) -> str:
    if scores is None or not scores.n_test:
        return "Unknown: it was not measured against labels."
    found = scores.of[scores.zero_shot.own if method == ZERO_SHOT else method]
    low, high = found.interval or (math.nan, math.nan)
    note = seen_note(scores.n_seen, scores.n_test)
    lines = [
        *([f"Mind that {note}.\n"] if note else []),
        "| on labelled images | |",
        "| --- | --- |",
        f"| images | {scores.n_test:,} |",
        f"| top-1{_of_seeds(found, seed)} | {found.top1:.1%} ({low:.1%} to {high:.1%}) |",
        *([f"| top-5 | {found.top5:.1%} |"] if len(scores.classes) > 5 else []),
        f"| mean over classes | {found.mean_per_class:.1%} |",
        f"| the better zero-shot | {scores.zero_shot.top1:.1%} |",
    ]
    if found.gained is not None:
        gain, low, high = found.gained
        lines.append(f"| gain over that, points | {100 * gain:+.1f} ({100 * low:+.1f} to {100 * high:+.1f}) |")
    return "\n".join(lines)


def _of_seeds(found: Score, seed: int | None) -> str:
    several = seed is not None and len(found.seeds) > 1
    return f", mean of the {len(found.seeds)} seeds of the method" if several else ""


def _use(method: str, domain: Domain, formats: Sequence[str]) -> str:
    lines = [_USE, "\nWithout latteflow, and for everything else:\n"]
    head = "`scale * unit(embedding - centre) @ prototypes.T`, with the three tensors of `classifier.safetensors`"
    if domain.clip.model == "embedded":
        lines.append(f"- the image tower is latteflow's own (`latteflow_embedded.json`); logits are {head}.")
    else:
        lines.append(
            f"- `open_clip.create_model_and_transforms('local-dir:FOLDER')` loads the towers; logits are {head}."
        )
    if "onnx" in formats:
        lines.append(
            "- `model.onnx` takes normalised `pixels` (n, 3, height, width), any n, and gives `features` and `logits`."
        )
    if "transformers" in formats:
        lines.append(
            f"- `transformers.CLIPModel.from_pretrained('FOLDER', subfolder='transformers')`; logits are {head}."
        )
    if domain.clip.resize == "pad":
        lines.append("- Pictures must be padded to a white square before any of these.")
    if method != ZERO_SHOT and (adapter := METHODS[method].adapter):
        lines.append(f"- {adapter.note}")
    return "\n".join(lines)
