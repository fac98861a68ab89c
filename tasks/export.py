"""export: an adapted model as a folder to ship, checked on images that it was adapted to, with a card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from models import clip
from models.settings import ZERO_SHOT
from storage.artifacts import Artifact, ArtifactStore
from storage.errors import DataError
from storage.shards import read_index, read_records
from tasks.card import model_card
from tasks.decode import opened
from tasks.domain import Domain
from tasks.features import centred, read_features, used_centre
from tasks.stage import StageResult, open_store
from tasks.tune import Tuned, chosen_model, part_name, tuned_clip, tuned_features

if TYPE_CHECKING:
    from models.predictor import Predictor

Format = Literal["onnx", "transformers"]
CHECKED = 8
"""Training images whose answers by the folder are compared with those by the store."""
MOST_DIFFERENCE = 0.05
"""Between probabilities of both; more is an error."""


@dataclass(frozen=True)
class RunRecord:
    """What the card says besides what the model's artifacts tell.

    Attributes:
        verdict: of the gate without labels, a sentence.
        metrics: the content of ``metrics.json``; None where the model was not evaluated.
        artifacts: fingerprints of further stages, by label.
    """

    verdict: str = ""
    metrics: Mapping[str, Any] | None = None
    artifacts: Mapping[str, str] = field(default_factory=dict)


def export_zero_shot(
    domain: Domain,
    embedded: StageResult,
    folder: Path,
    record: RunRecord | None = None,
    formats: Sequence[Format] = (),
) -> None:
    """Write the untouched model, with the classes as its classifier, as a folder of its own."""
    store = open_store(domain)
    artifact = store.open(embedded.ref)
    found = read_features(artifact)
    centre = used_centre(domain, found)
    model = Tuned(found.class_features, centre, None, None, None, {}, clip.load(domain.clip).scale)
    lineage = {"embed": artifact, "shard": _made(store, domain, "shard", artifact.inputs["shards"])}
    _Export(domain, ZERO_SHOT, None, model, lineage, centred(found.embeds, centre), found.keys).write(
        folder, record or RunRecord(), formats
    )


def export_tuned(
    domain: Domain,
    tuned: StageResult,
    seed: int | None,
    folder: Path,
    record: RunRecord | None = None,
    formats: Sequence[Format] = (),
    *,
    method: str | None = None,
) -> None:
    """Write one adapted model as a folder of its own (see :mod:`models.export`).

    Args:
        seed, method: which; by default the domain's first.
        formats: written into the folder as well.

    Raises:
        DataError: the domain has no such model, or what it was made from is gone.
        ModelError: the model has no such form, or the folder does not say what the store says.
    """
    chosen, number, model = chosen_model(domain, tuned, seed, method)
    store = open_store(domain)
    artifact = store.open(tuned.ref)
    texts = {stage: _found(store, domain, stage, artifact.inputs.get(stage)) for stage in ("pair", "screen")}
    embedded = _made(store, domain, "embed", artifact.inputs["embed"])
    lineage = {"tune": artifact, **{stage: each for stage, each in texts.items() if each}, "embed": embedded}
    lineage["shard"] = _made(store, domain, "shard", embedded.inputs["shards"])
    found = read_features(embedded)
    features = tuned_features(domain, model, lineage["shard"], found)
    _Export(domain, chosen, number, model, lineage, features, found.keys).write(folder, record or RunRecord(), formats)


def _found(store: ArtifactStore, domain: Domain, stage: str, digest: str | None) -> Artifact | None:
    """The artifact of a stage with this content, if it is there."""
    return next((each for each in store.all(domain.name, stage) if each.ref.digest == digest), None)


def _made(store: ArtifactStore, domain: Domain, stage: str, digest: str) -> Artifact:
    found = _found(store, domain, stage, digest)
    if found is None:
        raise DataError(f"the {stage} artifact that the model was made from is gone; run the domain again")
    return found


@dataclass(frozen=True)
class _Export:
    """A model on its way out.

    Attributes:
        lineage: artifacts that it was made from, by stage.
        features: of its training images by the model, unit rows ``(n, dim)``; ``keys`` are theirs.
    """

    domain: Domain
    method: str
    seed: int | None
    model: Tuned
    lineage: Mapping[str, Artifact]
    features: np.ndarray
    keys: Sequence[str]

    def write(self, folder: Path, record: RunRecord, formats: Sequence[Format]) -> None:
        import torch

        from models.errors import ModelError
        from models.export import CARD_FILE, CLAMP_FILE, export
        from models.predictor import Predictor, unknown_below

        model = self.model
        maps = {name: getattr(model, name) for name in ("image_map", "text_map")}
        export(
            tuned_clip(self.domain, model),
            folder,
            classes=self.domain.classes,
            prototypes=torch.from_numpy(model.prototypes),
            centre=torch.from_numpy(model.centre),
            scale=model.scale,
            resize=self.domain.clip.resize,
            grey_range=self.domain.shard.grey_range,
            unknown_below=unknown_below(self.features, model.prototypes, model.scale),
            **{name: None if change is None else torch.from_numpy(change) for name, change in maps.items()},
        )
        if self.method == "clamp":
            data = self.lineage["tune"].read(f"{part_name('clamp', self.seed)}.adapter.safetensors")
            (folder / CLAMP_FILE).write_bytes(data)
        predictor = Predictor.load(folder)
        difference = self._difference(predictor)
        if not difference <= MOST_DIFFERENCE:
            raise ModelError(
                f"the exported model differs from the adapted one by {difference:.2g} in a probability, so it "
                f"cannot be trusted; please report this with the model's name, {self.domain.clip.model}"
            )
        parity = {f"the run's own features, {CHECKED} training images": difference}
        if "onnx" in formats:
            from models.to_onnx import to_onnx

            parity["ONNX Runtime, noise"] = to_onnx(predictor, folder)
        if "transformers" in formats:
            from models.to_transformers import to_transformers

            parity["transformers, noise and texts (1 - cosine)"] = to_transformers(predictor, folder)
        card = model_card(
            self.domain,
            method=self.method,
            seed=self.seed,
            lineage=self.lineage,
            verdict=record.verdict,
            metrics=record.metrics,
            artifacts=record.artifacts,
            parity=parity,
            formats=formats,
        )
        (folder / CARD_FILE).write_text(card, encoding="utf-8")

    def _difference(self, predictor: Predictor) -> float:
        """The largest between the folder's and the store's probability of a class, on some training images."""
        import torch

        images = self.lineage["shard"]
        row = {key: number for number, key in enumerate(self.keys)}
        index = read_index(images)
        some = list(islice(read_records(images, index.filter(index["key"].is_in(list(row)))), CHECKED))
        pixels = torch.stack([predictor.clip.preprocess(opened(record)) for record in some])
        theirs = predictor.answers(pixels, len(self.domain.classes))
        head = self.model
        logits = head.scale * self.features[[row[record.key] for record in some]] @ head.prototypes.T
        ours = torch.from_numpy(logits).softmax(1).numpy()
        return float(np.abs(theirs.probabilities - np.take_along_axis(ours, theirs.ranked, 1)).max())


def record_of(selected: Artifact, evaluated: Artifact, verdict: str) -> RunRecord:
    """What a whole run says of its models, for the card."""
    metrics = json.loads(evaluated.read("metrics.json"))
    return RunRecord(verdict, metrics, {"select": selected.fingerprint, "evaluate": evaluated.fingerprint})
