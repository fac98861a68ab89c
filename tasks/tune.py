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
from models.settings import NOT_OF_THE_MODEL, OF_TEXTS, READS_PAIRS, READS_TEXTS, SEEDLESS, Method, PcClipSettings
from storage.artifacts import Artifact, ArtifactWriter, Part
from storage.errors import DataError
from storage.fingerprint import fingerprint
from storage.shards import read_index, read_records
from storage.tables import read_safetensors, safetensors
from tasks import clamp
from tasks.decode import pixel_batches
from tasks.domain import Domain
from tasks.features import Features, centred, read_features
from tasks.pair import read_class_pairs, read_pairs
from tasks.pixels import PixelReader
from tasks.screen import read_screened, read_text_features, usable
from tasks.stage import StageResult, open_store, run_stage
from tasks.training import Files, Progress, StoredCheckpoint, checkpoint, in_processes

_Stages = tuple[StageResult, ...]
"""Shards, features, screened texts and, where a method compares, texts about pairs."""

if TYPE_CHECKING:
    from models.adaptation import TuneData

VERSION = 1
_TOWERS = {"pc_clip": ".safetensors", "clamp": ".adapter.safetensors"}
"""Files of the text towers that others can read their texts with."""
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


def tune(
    domain: Domain,
    shards: StageResult,
    embedded: StageResult,
    screened: StageResult,
    paired: StageResult | None = None,
) -> StageResult:
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
        inputs |= _made_from(domain, embedded, screened, paired, method)
    if any(method not in SEEDLESS for method in domain.method):
        inputs["seeds"] = domain.seeds

    stages = tuple(stage for stage in (shards, embedded, screened, paired) if stage is not None)

    def body(writer: ArtifactWriter) -> Mapping[str, int]:
        trainers: dict[str | None, Trainer] = {}
        parts: dict[str, Part] = {}
        for method, seed, own in _parts(domain, embedded, screened, paired, domain.method):
            name = part_name(method, seed)
            part = writer.find(name, own)
            if part is None:
                reader = _reader(domain, method, seed)
                tower = (
                    None
                    if reader is None
                    else writer.read(parts[reader], reader + _TOWERS[domain.latteclip.texts_from])
                )
                identity = fingerprint("tune", VERSION, {"part": name, **own})
                key = f"{domain.name}/tune/checkpoints/{identity}.safetensors"
                with checkpoint(store.objects, key) as kept:
                    if domain.training.processes > 1:
                        processes = domain.training.processes
                        files = in_processes(processes, _train, domain, stages, method, seed, key, tower)
                    else:
                        trainer = trainers.get(reader) or Trainer(domain, stages, tower)
                        trainers = {reader: trainer}
                        files = trainer.run(method, seed, kept)
                part = writer.put(name, own, files)
            parts[name] = part
        return {"models": sum(len(domain.seeds_of(method)) for method in domain.method)}

    return run_stage(store, domain, "tune", VERSION, inputs, body)


def missing_models(
    domain: Domain, embedded: StageResult, screened: StageResult, paired: StageResult | None = None
) -> int:
    """How many models `tune` would have to train; without texts about pairs, all that need some."""
    writer = open_store(domain).writer(domain.name, "tune", VERSION, {})
    waiting = [method for method in domain.method if paired is None and _reads_pairs(domain, method)]
    others = [method for method in domain.method if method not in waiting]
    parts = _parts(domain, embedded, screened, paired, others)
    found = [writer.find(part_name(method, seed), own) for method, seed, own in parts]
    return found.count(None) + sum(len(domain.seeds_of(method)) for method in waiting)


def _parts(
    domain: Domain,
    embedded: StageResult,
    screened: StageResult,
    paired: StageResult | None,
    methods: Sequence[Method],
) -> Iterator[tuple[Method, int | None, dict[str, Any]]]:
    """Method, seed and inputs of each model; first those that others read."""
    for method in sorted(methods, key=lambda each: each not in _TOWERS):
        own = _made_from(domain, embedded, screened, paired, method)
        for seed in domain.seeds_of(method):
            yield method, seed, own if seed is None else {**own, "seed": seed}


def _read_by(domain: Domain, method: Method) -> Method | None:
    """By whose text tower the method's texts are read; None: the untouched CLIP's."""
    reader = domain.latteclip.texts_from
    return None if reader == "clip" or method not in READS_TEXTS else reader


def _reader(domain: Domain, method: Method, seed: int | None) -> str | None:
    """Name of the part with this tower."""
    reader = _read_by(domain, method)
    return reader and part_name(reader, seed)


def _reads_pairs(domain: Domain, method: Method) -> bool:
    return bool({method, _read_by(domain, method)} & READS_PAIRS)


def _made_from(
    domain: Domain, embedded: StageResult, screened: StageResult, paired: StageResult | None, method: Method
) -> dict[str, Any]:
    """What shapes the models of a method besides the seed, and nothing else."""
    own: dict[str, Any] = {
        "embed": embedded.ref.digest,
        "clip": clip.identity(domain.clip),
    }
    if method not in SEEDLESS:
        own["training"] = domain.training.model_dump(mode="json", exclude=NOT_OF_THE_MODEL)
    if "clamp" in (method, _read_by(domain, method)):
        own |= clamp.made_from(domain, screened)
    if method == "clamp":
        return own
    if method in READS_TEXTS or method == "class_descriptions":
        own["screen"] = screened.ref.digest
    if _reads_pairs(domain, method):
        assert paired is not None
        own |= {"pair": paired.ref.digest, "pc_clip": domain.pc_clip.model_dump(mode="json")}
    if method not in SEEDLESS | READS_PAIRS:
        exclude = None if method in READS_TEXTS else OF_TEXTS
        own["latteclip"] = domain.latteclip.model_dump(mode="json", exclude=exclude)
    if method == "latteclip_plus":
        own["independent_texts"] = _independent(domain)
    if method in ("transduction", "latteclip_plus"):
        own["transduction"] = domain.transduction.model_dump(mode="json")
    return own


def _independent(domain: Domain) -> bool:
    """Whether the describer sees more of an image than its features."""
    return domain.describer.kind != "tags"


def part_name(method: Method, seed: int | None) -> str:
    """Of a part, and of its files up to the suffix."""
    return method if seed is None or method in SEEDLESS else f"{method}.seed-{seed}"


def _train(domain: Domain, stages: _Stages, method: Method, seed: int | None, key: str, tower: bytes | None) -> Files:
    """One model in one of several processes."""
    return Trainer(domain, stages, tower).run(method, seed, StoredCheckpoint(open_store(domain).objects, key))


class Trainer:
    """What all models share: the CLIP, the features, and the texts' features, which are read when they are needed.

    Args:
        tower: file of the tower that reads the texts (`latteclip.texts_from`); by default the untouched CLIP.
    """

    def __init__(self, domain: Domain, stages: _Stages, tower: bytes | None = None) -> None:
        store = open_store(domain)
        self._images, embedded, self._screened, *paired = (store.open(each.ref) for each in stages)
        self._paired = paired[0] if paired else None
        self._domain, self._settings = domain, domain.latteclip
        self._clip, self._is_tuned = clip.load(domain.clip), tower is not None
        self._text_features: Callable[[Sequence[str]], np.ndarray] = self._clip.text_features
        if tower is not None and self._settings.texts_from == "clamp":
            self._text_features = clamp.text_reader(domain, tower)
        elif tower is not None:
            self._clip = text_reader(domain, tuned_from(tower))
            self._text_features = self._clip.text_features
        self._found = read_features(embedded)
        self._centre = self._found.shift

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
            class_texts=self._read(class_texts, self._text_features).unflatten(0, (len(self._domain.classes), -1)),
            pixels=PixelReader(self._images, self._found.keys, self._clip.preprocess) if towers else None,
        )

    @functools.cached_property
    def _described(self) -> TuneData:
        """The same with the texts of images and groups."""
        import torch

        captions, groups = (usable(read_screened(self._screened, kind)) for kind in ("images", "groups"))
        texts = dict(zip(captions["member_keys"].list.first(), captions["text"], strict=True))
        ordered = [texts.get(key, "") for key in self._found.keys]

        def features(kind: str) -> Callable[[Sequence[str]], np.ndarray]:
            screened = functools.partial(read_text_features, self._screened, kind)
            return self._text_features if self._is_tuned else screened

        return replace(
            self._trained,
            image_texts=self._read(ordered, features("images")),
            has_image_text=torch.tensor([text != "" for text in ordered]),
            group_texts=self._read(groups["text"].to_list(), features("groups")) if groups.height else None,
            group_classes=torch.tensor(groups["label"].to_list()) if groups.height else None,
            independent_texts=_independent(self._domain),
        )

    @functools.cached_property
    def _compared(self) -> TuneData:
        """The images with texts about pairs of them."""
        import torch

        from models.adaptation import PairData

        assert self._paired is not None

        def read(texts: Sequence[str]) -> torch.Tensor:
            if self._pc_clip.train == "projection":
                return torch.from_numpy(self._clip.text_features(texts))
            return self._clip.tokenizer(list(texts))

        place = {key: row for row, key in enumerate(self._found.keys)}
        table = read_pairs(self._paired).filter(
            pl.col("status") == "kept", pl.col("first").is_in(list(place)), pl.col("second").is_in(list(place))
        )
        cut = self._clip.too_long(table["text"].to_list())
        table = table.filter(~cut)
        log.info("tune pc_clip pairs=%d left_out_as_too_long=%d", table.height, cut.sum())
        if table.height < 2:
            raise DataError(
                f"{table.height} texts about pairs are left, {cut.sum()} are longer than the CLIP reads; pc_clip needs "
                "2 at least: ask for shorter texts (`pair` of the prompt pack)"
            )
        first, second = (torch.tensor([place[key] for key in table[name]]) for name in ("first", "second"))
        about = read_class_pairs(self._paired) if "classes.parquet" in self._paired.files else None
        class_texts = [text for prompts in self._domain.prompts() for text in prompts]
        return replace(
            self._plain,
            class_texts=read(class_texts).unflatten(0, (len(self._domain.classes), -1)),
            pairs=PairData(
                first=first,
                second=second,
                texts=read(table["text"].to_list()),
                class_pairs=None if about is None else about.select("label_a", "label_b").to_torch(),
                class_texts=None if about is None else read(about["text"].to_list()),
            ),
        )

    @functools.cached_property
    def _pc_clip(self) -> PcClipSettings:
        """With what is trained written out."""
        from models.embedded import EmbeddedClip

        own = self._domain.pc_clip
        default = "projection" if isinstance(self._clip.model, EmbeddedClip) else "blocks"
        return own.model_copy(update={"train": own.train or default})

    def _read(self, texts: Sequence[str], features: Callable[[Sequence[str]], np.ndarray]) -> Any:
        """Tokens where the text tower trains, else features."""
        import torch

        if self._settings.trains_towers and self._settings.trains_texts:
            return self._clip.tokenizer(list(texts))
        return torch.from_numpy(features(texts))

    @functools.cached_property
    def _class_described(self) -> TuneData:
        """The images, and class sentences with a description behind each; one that is none is left out."""
        import torch

        about = read_screened(self._screened, "classes").select("label", "text", "weight")
        texts = [
            f"{sentence.rstrip(' .')}. {text}" if weight else sentence
            for label, text, weight in about.iter_rows()
            for sentence in self._domain.prompts()[label]
        ]
        features = torch.from_numpy(self._clip.text_features(texts))
        return replace(self._plain, class_texts=features.unflatten(0, (len(self._domain.classes), -1)))

    def data(self, method: Method) -> TuneData:
        """What a method is given."""
        if method == "class_descriptions":
            return self._class_described
        if method in READS_PAIRS:
            return self._compared
        return self._described if method in READS_TEXTS else self._plain if method in SEEDLESS else self._trained

    def run(self, method: Method, seed: int | None, kept: StoredCheckpoint) -> Files:
        """Adapt, or go on with it: the files of the part."""
        import torch

        from models.methods import adapt

        name, folder = part_name(method, seed), Path(self._domain.output) / self._domain.name / "tensorboard"
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
            pc_clip=self._pc_clip,
            clip=self._clip.model if self._trains_towers(method) else None,
            scale=self._clip.scale,
            checkpoint=kept,
            on_step=progress,
        )
        progress.close()
        if result.text_weight is not None:
            log.info("tune %s texts weigh %.2f beside zero-shot", name, result.text_weight)
        found = {
            "prototypes": result.prototypes,
            "centre": torch.from_numpy(self._centre),
            "scale": torch.tensor([self._clip.scale]),
        }
        for attribute in ("image_map", "text_map", "assignments"):
            if (tensor := getattr(result, attribute)) is not None:
                found[attribute] = tensor
        towers = result.clip or (self._clip.model if self._is_tuned else None)
        if towers is not None:
            before = clip.load(self._domain.clip).model.state_dict()
            for key, tensor in towers.state_dict().items():
                if not tensor.equal(before[key]):
                    found[f"tower.{key}"] = tensor
        model = safetensors(**{key: tensor.cpu().numpy() for key, tensor in found.items()})
        return {f"{name}.safetensors": model, f"{name}.history.json": json.dumps(result.history).encode()}

    def _trains_towers(self, method: Method) -> bool:
        if method in READS_PAIRS:
            return self._pc_clip.train != "projection"
        return self._settings.trains_towers


def read_tuned(artifact: Artifact, method: Method, seed: int | None) -> Tuned:
    """One adapted model of a `tune` artifact."""
    return tuned_from(artifact.read(f"{part_name(method, seed)}.safetensors"))


def tuned_from(data: bytes) -> Tuned:
    """An adapted model from the bytes of its file."""
    found = read_safetensors(data)
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
    records: list[dict[str, float]] = json.loads(artifact.read(f"{part_name(method, seed)}.history.json"))
    return records


def tuned_features(domain: Domain, tuned: Tuned, images: Artifact, found: Features) -> np.ndarray:
    """Unit image features of the adapted model, ``(n, dim)``, in the order of ``found``.

    Args:
        images: the shards that ``found`` was made of; read only where the image tower itself was trained.
    """
    from models.towers import IMAGE_TOWERS

    embeds = found.embeds
    if any(name.startswith(IMAGE_TOWERS) for name in tuned.towers):
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


def chosen_model(
    domain: Domain, tuned: StageResult, seed: int | None, method: str | None
) -> tuple[Method, int | None, Tuned]:
    """The adapted model that somebody means, with its method and seed.

    Args:
        seed, method: which; by default the domain's first.

    Raises:
        DataError: the domain has no such model.
    """
    chosen, number = check_model(domain, seed, method)
    return chosen, number, read_tuned(open_store(domain).open(tuned.ref), chosen, number)


def check_model(domain: Domain, seed: int | None, method: str | None) -> tuple[Method, int | None]:
    """Method and seed of the adapted model that somebody means, before anything is read; see :func:`chosen_model`.

    Raises:
        DataError: the domain has no such model.
    """
    chosen = next((each for each in domain.method if method in (None, each)), None)
    if chosen is None:
        raise DataError(
            f"there is no model by {method!r}; `method` is {', '.join(domain.method)}, and zero_shot is the model as "
            "it came"
        )
    seeds = domain.seeds_of(chosen)
    if seed not in (None, *seeds):
        have = f"`seeds` are {', '.join(map(str, seeds))}" if None not in seeds else f"{chosen} has one model, no seeds"
        raise DataError(f"there is no model with seed {seed}; {have}")
    return chosen, seeds[0] if seed is None else seed


def text_reader(domain: Domain, tuned: Tuned) -> clip.Clip:
    """The domain's CLIP with the text tower of the adapted model, text map and all."""
    import torch

    from models.export import TEXT_PROJECTIONS, fold

    found = tuned_clip(domain, tuned)
    if tuned.text_map is None:
        return found
    model = copy.deepcopy(found.model)
    fold(model, TEXT_PROJECTIONS, torch.from_numpy(tuned.text_map).to(found.device))
    return replace(found, model=model)
