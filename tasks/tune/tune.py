"""tune: features and texts -> adapted models, of each method one for each seed."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latteflow.models.methods.latteclip import LatteClipSettings
from latteflow.models.methods.method import Method
from latteflow.models.methods.registry import METHODS
from latteflow.models.settings import NOT_OF_THE_MODEL
from latteflow.models.towers import clip
from latteflow.storage.artifacts import ArtifactWriter, Part
from latteflow.storage.fingerprint import fingerprint
from latteflow.storage.tables import safetensors, write_safetensors
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.stage import StageResult, open_store, run_stage
from latteflow.tasks.tune.inputs import Inputs, Stages, independent_texts
from latteflow.tasks.tune.models import ADAPTER, part_name
from latteflow.tasks.tune.training import Files, Progress, StoredCheckpoint, checkpoint, in_processes

if TYPE_CHECKING:
    import numpy as np

    from latteflow.models.methods.adaptation import Adapted

VERSION = 1
log = logging.getLogger("latteflow.tasks")


@dataclass(frozen=True)
class Planned:
    """A model to be trained.

    Attributes:
        method: its name, so that other processes can be told.
        inputs: what shapes it, and nothing else.
        reader: the method whose text tower, of the same seed, reads its texts; None: the untouched CLIP does.
    """

    method: str
    seed: int | None
    inputs: Mapping[str, Any]
    reader: str | None

    @property
    def name(self) -> str:
        """Of its part."""
        return part_name(self.method, self.seed)

    @property
    def reader_part(self) -> str | None:
        """The part with the tower that reads its texts."""
        return part_name(self.reader, self.seed) if self.reader else None


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
    stages = Stages(shards, embedded, screened, paired)

    def body(writer: ArtifactWriter) -> Mapping[str, int]:
        inputs: dict[str | None, Inputs] = {}
        parts: dict[str, Part] = {}
        for each in _planned(domain, stages, domain.methods):
            part = writer.find(each.name, each.inputs)
            if part is None:
                tower = _tower(writer, parts, each)
                identity = fingerprint("tune", VERSION, {"part": each.name, **each.inputs})
                key = f"{domain.name}/tune/checkpoints/{identity}.safetensors"
                with checkpoint(store.objects, key) as kept, tempfile.TemporaryDirectory() as folder:
                    if domain.training.processes > 1:
                        processes = domain.training.processes
                        files = in_processes(processes, _train_here, domain, stages, each, key, tower, folder)
                    else:
                        inputs = {each.reader_part: inputs.get(each.reader_part) or Inputs(domain, stages, tower)}
                        files = _train(inputs[each.reader_part], each, kept, folder)
                    part = writer.put(each.name, each.inputs, files)
            parts[each.name] = part
        return {"models": len(parts)}

    return run_stage(store, domain, "tune", VERSION, _made_from(domain, stages), body)


def missing_models(
    domain: Domain, embedded: StageResult, screened: StageResult, paired: StageResult | None = None
) -> int:
    """How many models `tune` would have to train; without texts about pairs, all that need some."""
    writer = open_store(domain).writer(domain.name, "tune", VERSION, {})
    stages = Stages(embedded, embedded, screened, paired)
    waiting = [each for each in domain.methods if paired is None and _reads(domain, each, "pairs")]
    planned = _planned(domain, stages, [each for each in domain.methods if each not in waiting])
    found = [writer.find(each.name, each.inputs) for each in planned]
    return found.count(None) + sum(len(domain.seeds_of(method.name)) for method in waiting)


def _planned(domain: Domain, stages: Stages, methods: Sequence[Method]) -> Iterator[Planned]:
    """The models of these methods; first those whose text tower others read with."""
    for method in sorted(methods, key=lambda each: not each.reads_for_others):
        own, reader = _shaped_by(domain, stages, method), _reader(domain, method)
        for seed in domain.seeds_of(method.name):
            inputs = own if seed is None else {**own, "seed": seed}
            yield Planned(method.name, seed, inputs, reader.name if reader else None)


def _reader(domain: Domain, method: Method) -> Method | None:
    """By whose text tower the method's texts are read; None: the untouched CLIP's."""
    return METHODS.get(domain.of(LatteClipSettings).texts_from) if method.reads == "texts" else None


def _reads(domain: Domain, method: Method, what: str) -> bool:
    """Whether a method, or the one whose text tower it has its texts read by, reads this."""
    reader = _reader(domain, method)
    return what in (method.reads, reader and reader.reads)


def _tower(writer: ArtifactWriter, parts: Mapping[str, Part], planned: Planned) -> bytes | None:
    """File of the text tower that reads the model's texts."""
    if planned.reader is None or planned.reader_part is None:
        return None
    ending = ADAPTER if METHODS[planned.reader].adapter else ".safetensors"
    return writer.read(parts[planned.reader_part], planned.reader_part + ending)


def _made_from(domain: Domain, stages: Stages) -> dict[str, Any]:
    """What shapes the models of all methods."""
    found: dict[str, Any] = {"method": sorted(domain.method)}
    for method in domain.methods:
        for name, value in _shaped_by(domain, stages, method).items():
            # Methods that share a section read more or less of it.
            found[name] = {**found.get(name, {}), **value} if isinstance(value, dict) else value
    if any(method.is_seeded for method in domain.methods):
        found["seeds"] = domain.seeds
    return found


def _shaped_by(domain: Domain, stages: Stages, method: Method) -> dict[str, Any]:
    """What shapes the models of a method besides the seed, and nothing else."""
    own: dict[str, Any] = {"embed": stages.embedded.ref.digest, "clip": clip.identity(domain.clip)}
    if method.is_seeded:
        own["training"] = domain.training.model_dump(mode="json", exclude=NOT_OF_THE_MODEL)
    for each in filter(None, (_reader(domain, method), method)):
        if each.reads_texts:
            own["screen"] = stages.screened.ref.digest
        if each.reads == "pairs":
            assert stages.paired is not None
            own["pair"] = stages.paired.ref.digest
        if each.weighs_texts:
            own["independent_texts"] = independent_texts(domain)
        own |= {name: section.read(domain.sections) for name, section in each.sections.items()}
        own |= each.made_from(domain.sections)
    return own


def _train_here(domain: Domain, stages: Stages, planned: Planned, key: str, tower: bytes | None, folder: str) -> Files:
    """One model in one of several processes."""
    return _train(Inputs(domain, stages, tower), planned, StoredCheckpoint(open_store(domain).objects, key), folder)


def _train(inputs: Inputs, planned: Planned, kept: StoredCheckpoint, folder: str) -> Files:
    """Adapt, or go on with it: the files of the part, of which what is large is in the folder."""
    import torch

    from latteflow.models.methods.method import Given

    domain, method, model = inputs.domain, METHODS[planned.method], inputs.clip
    scalars = Path(domain.output) / domain.name / "tensorboard" / planned.name
    progress = Progress(planned.name, scalars if domain.training.tensorboard else None)
    given = Given(
        data=inputs.of(method).to(model.device),
        sections=domain.sections,
        training=domain.training,
        clip=model.model if inputs.trains_towers(method) else None,
        scale=model.scale,
        seed=planned.seed or 0,
        engine={"checkpoint": kept, "on_step": progress},
    )
    result = method.adapt(given)
    progress.close()
    if result.text_weight is not None:
        log.info("tune %s texts weigh %.2f beside zero-shot", planned.name, result.text_weight)
    found = {
        "prototypes": result.prototypes,
        "centre": torch.from_numpy(inputs.centre),
        "scale": torch.tensor([model.scale]),
    }
    for attribute in ("image_map", "text_map"):
        if (tensor := getattr(result, attribute)) is not None:
            found[attribute] = tensor
    towers = result.clip or (model.model if inputs.has_own_tower else None)
    if towers is not None:
        before = clip.load(domain.clip).model.state_dict()
        for key, tensor in towers.state_dict().items():
            if not tensor.equal(before[key]):
                found[f"tower.{key}"] = tensor
    name = planned.name
    files: dict[str, bytes | Path] = {
        f"{name}.safetensors": _saved({key: tensor.cpu().numpy() for key, tensor in found.items()}, result, folder),
        f"{name}.history.json": json.dumps(result.history).encode(),
    }
    return files if result.adapter is None else {**files, name + ADAPTER: result.adapter}


def _saved(arrays: dict[str, np.ndarray], result: Adapted, folder: str) -> bytes | Path:
    """The tensors of a model as a file; what is on disk is not taken into memory."""
    from latteflow.models.rows import Rows, blocks

    said = result.assignments
    if isinstance(said, Rows):
        path = Path(folder, "model.safetensors")
        write_safetensors(path, arrays, "assignments", said.shape, (block.cpu().numpy() for _, block in blocks(said)))
        return path
    return safetensors(**arrays, **({} if said is None else {"assignments": said.cpu().numpy()}))
