"""export: an adapted model as a folder to ship, checked on images that it was adapted to, with a card."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from latteflow.models.errors import ModelError
from latteflow.models.methods.registry import METHODS
from latteflow.models.settings import ZERO_SHOT
from latteflow.models.towers import clip
from latteflow.models.towers.folder import CARD_FILE, check_target, list_files, written
from latteflow.storage.artifacts import Artifact, ArtifactStore
from latteflow.storage.errors import DataError
from latteflow.storage.folders import carry, check_place, whole_folder
from latteflow.storage.shards import read_index, read_records
from latteflow.tasks.core.decode import opened
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.features import Features, centred, read_features
from latteflow.tasks.core.stage import StageResult, open_store
from latteflow.tasks.report.scores import Scores, read_scores
from latteflow.tasks.ship.card import model_card
from latteflow.tasks.tune.heldout import held_out_scores, why_not
from latteflow.tasks.tune.models import ADAPTER, Tuned, chosen_model, part_name, tuned_clip, tuned_features
from latteflow.tasks.tune.select import label_free_temperature

if TYPE_CHECKING:
    from latteflow.models.ship.predictor import Predictor

log = logging.getLogger("latteflow.tasks")
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
        scores: None where the model was not evaluated.
        artifacts: fingerprints of further stages, by label.
    """

    verdict: str = ""
    scores: Scores | None = None
    artifacts: Mapping[str, str] = field(default_factory=dict)


def check_export(domain: Domain, folder: Path, *, force: bool = False) -> None:
    """Whether a model may be exported there, before anything is made.

    Args:
        force: among other files, which stay.

    Raises:
        DataError: there can be no such folder.
        ModelError: it holds other things than an earlier export, or is the one that the base model is read from.
    """
    if Path(domain.clip.model.removeprefix("local-dir:")).resolve() == folder.resolve():
        raise ModelError(f"folder {folder} is the one that the base model is read from; give another")
    check_place(folder)
    check_target(folder, force=force)


def export_zero_shot(
    domain: Domain,
    embedded: StageResult,
    folder: Path,
    record: RunRecord | None = None,
    formats: Sequence[Format] = (),
    *,
    force: bool = False,
) -> None:
    """Write the untouched model, with the classes as its classifier, as a folder of its own.

    Args and errors are those of :func:`export_tuned`.
    """
    check_export(domain, folder, force=force)
    store = open_store(domain)
    artifact = store.open(embedded.ref)
    found = read_features(artifact)
    model = Tuned(found.class_features, found.shift, None, None, None, {}, clip.load(domain.clip).scale)
    lineage = {"embed": artifact, "shard": _made(store, domain, "shard", artifact.inputs["shards"])}
    features = centred(found.embeds, found.shift)
    _Export(domain, None, None, model, lineage, features, found).write(
        folder, record or RunRecord(), formats, force=force
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
    force: bool = False,
) -> None:
    """Write one adapted model as a folder of its own (see :mod:`models.ship.export`).

    Args:
        seed, method: which; by default the domain's first.
        formats: written into the folder as well.
        folder, force: see :func:`check_export`. The folder appears, or takes the place of an earlier export, whole.

    Raises:
        DataError: the domain has no such model, or what it was made from is gone.
        ModelError: the model has no such form, or the folder does not say what the store says.
    """
    check_export(domain, folder, force=force)
    chosen, number, model = chosen_model(domain, tuned, seed, method)
    store = open_store(domain)
    artifact = store.open(tuned.ref)
    texts = {stage: _found(store, domain, stage, artifact.inputs.get(stage)) for stage in ("pair", "screen")}
    embedded = _made(store, domain, "embed", artifact.inputs["embed"])
    lineage = {"tune": artifact, **{stage: each for stage, each in texts.items() if each}, "embed": embedded}
    lineage["shard"] = _made(store, domain, "shard", embedded.inputs["shards"])
    found = read_features(embedded)
    features = tuned_features(domain, model, lineage["shard"], found)
    _Export(domain, chosen, number, model, lineage, features, found).write(
        folder, record or RunRecord(), formats, force=force
    )


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
        method: None for zero-shot.
        lineage: artifacts that it was made from, by stage.
        features: of its training images by the model, unit rows ``(n, dim)``, in the order of ``found``.
        found: the same images by the untouched CLIP.
    """

    domain: Domain
    method: str | None
    seed: int | None
    model: Tuned
    lineage: Mapping[str, Artifact]
    features: np.ndarray
    found: Features

    def write(self, folder: Path, record: RunRecord, formats: Sequence[Format], *, force: bool) -> None:
        with whole_folder(folder) as new:
            self._write(new, record, formats)
            list_files(new)
            if force and folder.is_dir():
                carry(folder, new, without=written(folder))

    def _write(self, folder: Path, record: RunRecord, formats: Sequence[Format]) -> None:
        import torch

        from latteflow.models.ship.export import export
        from latteflow.models.ship.predictor import Predictor

        below, why = self._unknown_below()
        if why:
            log.warning("images of none of the classes are not marked (`unknown` stays empty): %s", why)
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
            unknown_below=below,
            temperature=label_free_temperature(
                self.found, self.features, self.model.prototypes, self.model.scale, self.method
            ),
            **{name: None if change is None else torch.from_numpy(change) for name, change in maps.items()},
        )
        if self.method and METHODS[self.method].adapter:
            data = self.lineage["tune"].read(part_name(self.method, self.seed) + ADAPTER)
            (folder / f"{self.method}.safetensors").write_bytes(data)
        predictor = Predictor.load(folder)
        difference = self._difference(predictor)
        if not difference <= MOST_DIFFERENCE:
            raise ModelError(
                f"the exported model differs from the adapted one by {difference:.2g} in a probability, so it "
                f"cannot be trusted; please report this with the model's name, {self.domain.clip.model}"
            )
        parity = {f"the run's own features, {CHECKED} training images": difference}
        if "onnx" in formats:
            from latteflow.models.ship.to_onnx import to_onnx

            parity["ONNX Runtime, noise"] = to_onnx(predictor, folder)
        if "transformers" in formats:
            from latteflow.models.ship.to_transformers import to_transformers

            parity["transformers, noise and texts (unit features)"] = to_transformers(predictor, folder)
        card = model_card(
            self.domain,
            method=self.method or ZERO_SHOT,
            seed=self.seed,
            lineage=self.lineage,
            verdict=record.verdict,
            scores=record.scores,
            artifacts=record.artifacts,
            parity=parity,
            formats=formats,
            temperature=predictor.head.temperature,
            unknown=f"not marked, as {why}" if why else "marked by a score that 99 % of new ones of the domain reach",
        )
        (folder / CARD_FILE).write_text(card, encoding="utf-8")

    def _unknown_below(self) -> tuple[float | None, str]:
        """The score below which an image is *unknown*; without one, why."""
        from latteflow.models.ship.predictor import UNKNOWN_SHARE, scores, unknown_below

        least = math.ceil(1 / UNKNOWN_SHARE) - 1
        if len(self.found.keys) < least:
            return None, f"{len(self.found.keys)} images are too few to say how low scores may be; {least} are needed"
        if self.method is None or not METHODS[self.method].learns_from_images:
            return unknown_below(scores(self.features, self.model.prototypes, self.model.scale)), ""
        if why := why_not(self.domain, METHODS[self.method]):
            return None, f"it takes images that the model has not learnt from, and for those {why}"
        made_from = self.lineage["shard"], self.lineage["embed"], self.lineage.get("screen")
        return unknown_below(held_out_scores(self.domain, METHODS[self.method], self.seed, *made_from)), ""

    def _difference(self, predictor: Predictor) -> float:
        """The largest between the folder's and the store's probability of a class, on some training images."""
        import torch

        # At a high temperature everything would look alike.
        predictor = copy.copy(predictor)
        predictor.head = replace(predictor.head, temperature=1.0)
        images = self.lineage["shard"]
        row = {key: number for number, key in enumerate(self.found.keys)}
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
    fingerprints = {"select": selected.fingerprint, "evaluate": evaluated.fingerprint}
    return RunRecord(verdict, read_scores(evaluated), fingerprints)
