"""tune: features and texts -> adapted models, of each method one for each seed."""

from __future__ import annotations

import copy
import functools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from models import clip
from models.settings import NOT_OF_THE_MODEL, OF_TEXTS, READS_TEXTS, SEEDLESS, Method
from storage.artifacts import Artifact, ArtifactWriter
from storage.errors import DataError
from storage.fingerprint import fingerprint
from storage.shards import read_index, read_records
from storage.tables import read_safetensors, safetensors
from tasks import clamp
from tasks.decode import pixel_batches
from tasks.domain import Domain
from tasks.features import Features, centred, read_features
from tasks.pixels import PixelReader
from tasks.screen import read_screened, read_text_features, usable
from tasks.stage import StageResult, open_store, run_stage
from tasks.training import Files, Progress, StoredCheckpoint, checkpoint, in_processes

_Stages = tuple[StageResult, StageResult, StageResult]
"""Shards, features and screened texts."""

if TYPE_CHECKING:
    from models.adaptation import TuneData

VERSION = 1
log = logging.getLogger("latteflow.tasks")


@dataclass(frozen=True)
class Tuned:
    """One adapted model, as the difference to the CLIP it came from.

    Attributes:
        prototypes: the classifier, unit rows ``(classes, dim)``.
        centre: subtracted from image embeddings, ``(dim,)``; zeros without centring.
        image_map, text_map: ``(dim, dim)`` on the right of the towers' embeddings, or None.
        assignments: soft classes of the images it was adapted to, ``(n, classes)``, in the order of their features;
            None of a method that knows them no better than other images.
        towers: tensors of the CLIP that training changed, by name; empty where the towers are as they were.
        scale: exp(logit_scale) of the CLIP, which stays that of the classifier whatever scale the loss had (4.10).
    """

    prototypes: np.ndarray
    centre: np.ndarray
    image_map: np.ndarray | None
    text_map: np.ndarray | None
    assignments: np.ndarray | None
    towers: Mapping[str, np.ndarray]
    scale: float


def tune(domain: Domain, shards: StageResult, embedded: StageResult, screened: StageResult) -> StageResult:
    """Adapt to the domain's features and the texts that passed the screen: by each method, once for each seed.

    A text's weight says whether it is used, and which of several; in the mixer all that are used count as the paper
    has it.

    Files: ``<method>.seed-<n>.safetensors`` (prototypes, centre, scale, maps, assignments; tensors of trained towers
    under ``tower.``) and ``<method>.seed-<n>.history.json`` (one record for each epoch); ``transduction.safetensors``
    and so on for a method without random numbers; beside those of CLAMP ``clamp.seed-<n>.adapter.safetensors``. Each is
    a part, made from only what its method reads. The one under way is kept in ``checkpoints/``, from where a killed run
    goes on.
    """
    store = open_store(domain)
    inputs: dict[str, Any] = {"method": sorted(domain.method)}
    for method in sorted(domain.method, key=lambda each: each in READS_TEXTS):  # last those that read all of a section
        inputs |= _made_from(domain, embedded, screened, method)
    if any(method not in SEEDLESS for method in domain.method):
        inputs["seeds"] = domain.seeds

    stages = (shards, embedded, screened)

    def body(writer: ArtifactWriter) -> Mapping[str, int]:
        trainer: Trainer | None = None
        for method, seed, own in _parts(domain, embedded, screened):
            name = _name(method, seed)
            if writer.find(name, own) is None:
                identity = fingerprint("tune", VERSION, {"part": name, **own})
                key = f"{domain.name}/tune/checkpoints/{identity}.safetensors"
                with checkpoint(store.objects, key) as kept:
                    if domain.training.processes > 1:
                        files = in_processes(domain.training.processes, _train, domain, stages, method, seed, key)
                    else:
                        trainer = trainer or Trainer(domain, stages)
                        files = trainer.run(method, seed, kept)
                writer.put(name, own, files)
        return {"models": sum(len(domain.seeds_of(method)) for method in domain.method)}

    return run_stage(store, domain, "tune", VERSION, inputs, body)


def missing_models(domain: Domain, embedded: StageResult, screened: StageResult) -> int:
    """How many models `tune` would have to train."""
    writer = open_store(domain).writer(domain.name, "tune", VERSION, {})
    found = [writer.find(_name(method, seed), own) for method, seed, own in _parts(domain, embedded, screened)]
    return found.count(None)


def _parts(
    domain: Domain, embedded: StageResult, screened: StageResult
) -> Iterator[tuple[Method, int | None, dict[str, Any]]]:
    """Method, seed and inputs of each model."""
    for method in domain.method:
        own = _made_from(domain, embedded, screened, method)
        for seed in domain.seeds_of(method):
            yield method, seed, own if seed is None else {**own, "seed": seed}


def _made_from(domain: Domain, embedded: StageResult, screened: StageResult, method: Method) -> dict[str, Any]:
    """What shapes the models of a method besides the seed, and nothing else."""
    own: dict[str, Any] = {
        "embed": embedded.ref.digest,
        "clip": clip.identity(domain.clip),
        "centred": clip.is_centred(domain.clip),
    }
    if method == "clamp":
        return own | clamp.made_from(domain, screened)
    if method in READS_TEXTS:
        own["screen"] = screened.ref.digest
    if method != "transduction":
        exclude = None if method in READS_TEXTS else OF_TEXTS
        own["latteclip"] = domain.latteclip.model_dump(mode="json", exclude=exclude)
        own["training"] = domain.training.model_dump(mode="json", exclude=NOT_OF_THE_MODEL)
    if method in ("transduction", "latteclip_plus"):
        own["transduction"] = domain.transduction.model_dump(mode="json")
    return own


def _name(method: Method, seed: int | None) -> str:
    """Of a part, and of its files up to the suffix."""
    return method if seed is None or method in SEEDLESS else f"{method}.seed-{seed}"


def _train(domain: Domain, stages: _Stages, method: Method, seed: int | None, key: str) -> Files:
    """One model in one of several processes."""
    return Trainer(domain, stages).run(method, seed, StoredCheckpoint(open_store(domain).objects, key))


class Trainer:
    """What all models share: the CLIP, the features, and the texts' features, which are read when they are needed."""

    def __init__(self, domain: Domain, stages: _Stages) -> None:
        store = open_store(domain)
        self._images, embedded, self._screened = (store.open(each.ref) for each in stages)
        self._domain, self._settings = domain, domain.latteclip
        self._clip = clip.load(domain.clip)
        self._found = read_features(embedded)
        self._centre = self._found.centre if clip.is_centred(domain.clip) else np.zeros_like(self._found.centre)

    @functools.cached_property
    def _plain(self) -> TuneData:
        """The images, and features of the classes' sentences."""
        import torch

        from models.adaptation import TuneData

        return TuneData(
            pseudo_labels=torch.from_numpy(self._found.zero_shot.copy()),
            class_texts=torch.from_numpy(self._found.class_features),
            image_embeds=torch.from_numpy(self._found.embeds),
            centre=torch.from_numpy(self._centre),
        )

    @functools.cached_property
    def _trained(self) -> TuneData:
        """The same for a method that trains: every sentence by itself, and pixels where towers train."""
        class_texts = [text for prompts in self._domain.prompts() for text in prompts]
        towers = self._settings.trains_towers
        return replace(
            self._plain,
            class_texts=self._read(class_texts, self._clip.text_features).unflatten(0, (len(self._domain.classes), -1)),
            pixels=PixelReader(self._images, self._found.keys, self._clip.preprocess) if towers else None,
        )

    @functools.cached_property
    def _described(self) -> TuneData:
        """The same with the texts of images and groups."""
        import torch

        captions, groups = (usable(read_screened(self._screened, kind)) for kind in ("images", "groups"))
        texts = dict(zip(captions["member_keys"].list.first(), captions["text"], strict=True))
        ordered = [texts.get(key, "") for key in self._found.keys]
        features = functools.partial(read_text_features, self._screened)
        return replace(
            self._trained,
            image_texts=self._read(ordered, functools.partial(features, "images")),
            has_image_text=torch.tensor([text != "" for text in ordered]),
            group_texts=self._read(groups["text"].to_list(), functools.partial(features, "groups"))
            if groups.height
            else None,
            group_classes=torch.tensor(groups["label"].to_list()) if groups.height else None,
        )

    def _read(self, texts: Sequence[str], features: Callable[[Sequence[str]], np.ndarray]) -> Any:
        """Tokens where the text tower trains, else features."""
        import torch

        if self._settings.trains_towers and self._settings.trains_texts:
            return self._clip.tokenizer(list(texts))
        return torch.from_numpy(features(texts))

    def data(self, method: Method) -> TuneData:
        """What a method is given."""
        return self._described if method in READS_TEXTS else self._plain if method in SEEDLESS else self._trained

    def run(self, method: Method, seed: int | None, kept: StoredCheckpoint) -> Files:
        """Adapt, or go on with it: the files of the part."""
        import torch

        from models.methods import adapt

        name, folder = _name(method, seed), Path(self._domain.output) / self._domain.name / "tensorboard"
        progress = Progress(name, folder / name if self._domain.training.tensorboard else None)
        if method == "clamp":
            files = clamp.train(
                self._domain, self._clip, self._found, self._centre, self._screened, name, seed or 0, kept, progress
            )
            progress.close()
            return files
        result = adapt(
            method,
            self.data(method).to(self._clip.device),
            self._settings,
            self._domain.transduction,
            self._domain.training,
            seed=seed or 0,
            clip=self._clip.model if self._settings.trains_towers else None,
            scale=self._clip.scale,
            checkpoint=kept,
            on_step=progress,
        )
        progress.close()
        found = {
            "prototypes": result.prototypes,
            "centre": torch.from_numpy(self._centre),
            "scale": torch.tensor([self._clip.scale]),
        }
        for attribute in ("image_map", "text_map", "assignments"):
            if (tensor := getattr(result, attribute)) is not None:
                found[attribute] = tensor
        if result.clip is not None:
            before = self._clip.model.state_dict()
            for key, tensor in result.clip.state_dict().items():
                if not tensor.equal(before[key]):
                    found[f"tower.{key}"] = tensor
        model = safetensors(**{key: tensor.cpu().numpy() for key, tensor in found.items()})
        return {f"{name}.safetensors": model, f"{name}.history.json": json.dumps(result.history).encode()}


def read_tuned(artifact: Artifact, method: Method, seed: int | None) -> Tuned:
    """One adapted model of a `tune` artifact."""
    found = read_safetensors(artifact.read(f"{_name(method, seed)}.safetensors"))
    return Tuned(
        prototypes=found["prototypes"],
        centre=found["centre"],
        image_map=found.get("image_map"),
        text_map=found.get("text_map"),
        assignments=found.get("assignments"),
        towers={name.removeprefix("tower."): found[name] for name in found if name.startswith("tower.")},
        scale=float(found["scale"][0]),
    )


def read_history(artifact: Artifact, method: Method, seed: int | None) -> list[dict[str, float]]:
    """One record for each epoch of a model of a `tune` artifact; none for a method that has no epochs."""
    records: list[dict[str, float]] = json.loads(artifact.read(f"{_name(method, seed)}.history.json"))
    return records


def tuned_features(domain: Domain, tuned: Tuned, images: Artifact, found: Features) -> np.ndarray:
    """Unit image features of the adapted model, ``(n, dim)``, in the order of ``found``.

    Args:
        images: the shards that ``found`` was made of; read only where the towers themselves were trained.
    """
    embeds = found.embeds
    if tuned.towers:
        model = tuned_clip(domain, tuned)
        index = read_index(images).filter(pl.col("key").is_in(found.keys))
        records = read_records(images, index)
        batches = pixel_batches(records, model.preprocess, batch=domain.embed.batch)
        embeds = np.concatenate([model.image_embeds(pixels).numpy() for _, pixels in batches])
    if tuned.image_map is None:
        return centred(embeds, tuned.centre)
    return centred((embeds - tuned.centre) @ tuned.image_map, np.zeros_like(tuned.centre))


def tuned_clip(domain: Domain, tuned: Tuned) -> clip.Clip:
    """The domain's CLIP with the trained tensors in place (maps are not folded in)."""
    import torch

    model = clip.load(domain.clip)
    if not tuned.towers:
        return model
    own = copy.deepcopy(model.model)
    own.load_state_dict({name: torch.from_numpy(array) for name, array in tuned.towers.items()}, strict=False)
    return replace(model, model=own)


def export_tuned(
    domain: Domain, tuned: StageResult, seed: int | None, folder: Path, *, method: str | None = None
) -> None:
    """Write one adapted model as a folder of its own (see :mod:`models.export`).

    Args:
        seed, method: which; by default the domain's first.

    Raises:
        DataError: the domain has no such model.
    """
    import torch

    from models.export import export

    chosen = next((each for each in domain.method if method in (None, each)), None)
    if chosen is None:
        raise DataError(f"there is no model by {method!r}; `method` is {', '.join(domain.method)}")
    seeds = domain.seeds_of(chosen)
    if seed not in (None, *seeds):
        have = f"`seeds` are {', '.join(map(str, seeds))}" if None not in seeds else f"{chosen} has one model, no seeds"
        raise DataError(f"there is no model with seed {seed}; {have}")
    number = seeds[0] if seed is None else seed
    found = read_tuned(open_store(domain).open(tuned.ref), chosen, number)
    maps = {name: getattr(found, name) for name in ("image_map", "text_map")}
    export(
        tuned_clip(domain, found),
        folder,
        classes=domain.classes,
        prototypes=torch.from_numpy(found.prototypes),
        centre=torch.from_numpy(found.centre),
        scale=found.scale,
        **{name: None if change is None else torch.from_numpy(change) for name, change in maps.items()},
    )
    if chosen == "clamp":
        data = open_store(domain).open(tuned.ref).read(f"{_name(chosen, number)}.adapter.safetensors")
        (folder / "clamp.safetensors").write_bytes(data)
