"""The functions and classes of :mod:`latteflow`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latteflow.flows.errors import UsageError as UsageError
from latteflow.models.errors import ModelError as ModelError
from latteflow.storage.errors import DataError as DataError
from latteflow.storage.errors import StorageError as StorageError
from latteflow.tasks.core.domain import Domain as Domain
from latteflow.tasks.core.errors import ConfigError as ConfigError

if TYPE_CHECKING:
    import numpy as np
    import polars as pl

    from latteflow.flows.plan import Planned
    from latteflow.models.ship.predictor import Predictor
    from latteflow.storage.artifacts import Artifact


class Stage:
    """What one stage of a run made. Whatever is read is checked against its digest."""

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact

    def __repr__(self) -> str:
        return f"Stage({self._artifact.stage} {self._artifact.fingerprint[:12]}, {len(self.files)} files)"

    @property
    def fingerprint(self) -> str:
        """Of all that it was made from, 64 hexadecimal characters."""
        return self._artifact.fingerprint

    @property
    def made_from(self) -> Mapping[str, Any]:
        """Settings as they were, and digests of earlier artifacts."""
        return self._artifact.inputs

    @property
    def counts(self) -> Mapping[str, int]:
        """Of images, texts or models, as the run printed them."""
        return self._artifact.counts

    @property
    def files(self) -> list[str]:
        """Their names, sorted."""
        return sorted(self._artifact.files)

    def read(self, name: str) -> bytes:
        """A file.

        Raises:
            StorageError: there is no such file, or its bytes are not those that were written.
        """
        return self._artifact.read(name)

    def frame(self, *names: str) -> pl.DataFrame:
        """Parquet files below each other, by default all of the stage: those of one kind have the same columns.

        Raises:
            StorageError: as :meth:`read`; there is no Parquet file.
        """
        import polars as pl

        from latteflow.storage.tables import read_parquet

        wanted = names or [name for name in self.files if name.endswith(".parquet")]
        if not wanted:
            raise StorageError(f"stage {self._artifact.stage} has no table; it has {', '.join(self.files[:5])}")
        return pl.concat([read_parquet(self.read(name)) for name in wanted])

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """A safetensors file."""
        from latteflow.storage.tables import read_safetensors

        return read_safetensors(self.read(name))

    def samples(self) -> Iterator[dict[str, Any]]:
        """The images of `shard`, as webdataset reads them: ``__key__``, ``json`` and the picture's bytes by its ending.

        Raises:
            StorageError: the stage has no shards.
        """
        from webdataset import WebDataset

        urls = [self._artifact.address(name) for name in self.files if name.endswith(".tar")]
        if not urls:
            raise StorageError(f"stage {self._artifact.stage} has no shards; `shard train` has")
        yield from WebDataset(urls, shardshuffle=False)


class Run(Mapping[str, Stage]):
    """A run's stages by name; `shard` and `embed` by name and split: ``shard train``, ``embed test``."""

    def __init__(self, stages: Mapping[str, Stage]) -> None:
        self._stages = dict(stages)

    def __getitem__(self, label: str) -> Stage:
        return self._stages[label]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stages)

    def __len__(self) -> int:
        return len(self._stages)

    def __repr__(self) -> str:
        return f"Run({', '.join(self)})"

    @property
    def metrics(self) -> dict[str, Any]:
        """Of `evaluate`, as docs/evaluation.md describes metrics.json."""
        import json

        found: dict[str, Any] = json.loads(self["evaluate"].read("metrics.json"))
        return found


def run(domain: Domain, *, refresh: Iterable[str] = ()) -> Run:
    """Adapt to a domain: every stage, in this process, finished work taken from the store.

    Args:
        refresh: names of stages to make anew.

    Raises:
        ModelError: a model cannot be had, loaded or trained; before any stage, where that can be told.
        DataError: the images or labels are unusable as a whole.
        StorageError: the store cannot do what is asked.
        UsageError: there is no such stage.
    """
    from latteflow.flows.pipeline import repaired, run_plainly
    from latteflow.tasks.core.stage import open_store

    asked, store = list(refresh), open_store(domain)
    results = repaired(lambda domain: run_plainly(domain, refresh=asked), domain)
    return Run({result.label: Stage(store.open(result.ref)) for result in results})


def newest(domain: Domain) -> Run:
    """The newest complete run, as it lies in the store; nothing is made.

    Raises:
        DataError: there is none.
    """
    from latteflow.tasks.core.stage import open_store
    from latteflow.tasks.report.history import History

    found = History(open_store(domain), domain.name).newest_run()
    if not found:
        raise DataError(f"domain {domain.name!r} has no complete run in {domain.store}; `latteflow.run` makes one")
    return Run({label: Stage(artifact) for label, artifact in found.items()})


def plan(domain: Domain) -> list[Planned]:
    """What a run would do, and why, stage by stage; nothing is made and no model loaded.

    Raises:
        DataError: the source is missing or empty.
        ModelError: a model cannot be had.
    """
    from latteflow.flows.plan import plan

    return plan(domain)


def export(domain: Domain, folder: str | Path, *, force: bool = False) -> None:
    """The model that the gate keeps, which may be zero-shot, as a folder that open_clip and we load.

    Args:
        folder: new, empty, or of an earlier export, which is replaced when the new one is whole.
        force: into a folder that holds other things, too.

    Raises:
        DataError: there can be no such folder.
        ModelError: the folder holds other things.
    """
    from latteflow.flows.export import export

    export(domain, Path(folder), force=force)


def load_model(folder: str | Path) -> Predictor:
    """An exported model: ``predict`` takes pictures that PIL opened, and ``classes`` are its names.

    Raises:
        ModelError: the folder is not a sound model.
    """
    from latteflow.models.ship.predictor import Predictor

    return Predictor.load(Path(folder))


def predict(folder: str | Path, images: str, *, top: int = 5, batch: int = 64) -> pl.DataFrame:
    """The classes of all images of a source by an exported model, a row for each, in the order of their paths.

    Args:
        images: a folder, a file, a pattern, tars, tables; here or in a bucket (docs/sources.md).
        top: classes for each image.
        batch: images in one forward pass.

    Returns:
        The columns of ``latteflow predict`` (docs/serving.md). Images that cannot be used are not in it.

    Raises:
        ModelError: the folder is not a sound model.
        DataError: there is no image.
    """
    from latteflow.tasks.ship.predict import classify

    return classify(lambda: load_model(folder), images, top=top, batch=batch).table
