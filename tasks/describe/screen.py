"""screen: texts -> flags and weights; which of them training may use, and why not the others."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from latteflow.models.texts.screening import Rows, Subjects, Texts, describes_class
from latteflow.models.texts.screening import screen as screened
from latteflow.models.towers import clip
from latteflow.storage.artifacts import Artifact, ArtifactWriter
from latteflow.storage.shards import read_index
from latteflow.storage.tables import parquet, read_parquet
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.features import Features, matrix, read_features
from latteflow.tasks.core.stage import StageResult, open_store, run_stage

if TYPE_CHECKING:
    from latteflow.models.rows import Matrix

VERSION = 2
_COLUMNS = ("caption_key", "member_keys", "index", "label", "text", "detail", "flags", "weight")


def screen(
    domain: Domain, shards: StageResult, embedded: StageResult, described: StageResult, grouped: StageResult
) -> StageResult:
    """Flags and a weight for every text; no text is left out.

    Files: ``images.parquet`` and ``groups.parquet``, one row for each text: caption_key, member_keys, index (which of
    several texts), label (pseudo-class), text, detail (why there is none), flags (the describer's and those of
    :mod:`models.texts.screening`), weight (0: not used), clip_score and clip_score_shuffled (cosines of the text with
    its own and with other images). Beside each, ``*.features.parquet`` with the distinct texts and their unit features,
    so that no later stage reads them. ``classes.parquet``, where there are texts about classes: the describer's table
    with a weight of 0 or 1.
    """
    store = open_store(domain)
    names = domain.prompt_names
    shared = {
        "embed": embedded.ref.digest,
        "clip": clip.identity(domain.clip),
        "classes": names,
        "screen": domain.screen.model_dump(mode="json"),
    }
    inputs = {**shared, "describe": described.ref.digest, "group": grouped.ref.digest}

    def body(writer: ArtifactWriter) -> Mapping[str, int]:
        found = read_features(store.open(embedded.ref))
        contents = dict(read_index(store.open(shards.ref)).select("key", "sha256").iter_rows())
        read: dict[str, tuple[StageResult, Callable[[Artifact], pl.DataFrame]]] = {
            "images": (described, _image_texts),
            "groups": (grouped, _group_texts),
        }
        for part, (source, texts) in read.items():
            own = {**shared, "texts": source.ref.digest}
            if writer.find(part, own) is None:
                table, features = _screened(domain, names, found, contents, texts(store.open(source.ref)))
                files = {f"{part}.parquet": parquet(table), f"{part}.features.parquet": parquet(features)}
                writer.put(part, own, files, rows=table.height, counts=_counts(table))
        _class_texts(writer, store.open(described.ref))
        return {"images": len(found.keys)}

    return run_stage(store, domain, "screen", VERSION, inputs, body)


def _class_texts(writer: ArtifactWriter, described: Artifact) -> None:
    if "classes.parquet" not in described.files:
        return
    own = {"texts": described.files["classes.parquet"][1].sha256}
    if writer.find("classes", own) is None:
        table = read_parquet(described.read("classes.parquet")).with_columns(text=pl.col("text").fill_null(""))
        weights = [float(describes_class(text)) for text in table["text"]]
        table = table.with_columns(weight=pl.Series(weights, dtype=pl.Float32))
        writer.put("classes", own, {"classes.parquet": parquet(table)}, rows=table.height)


def _image_texts(described: Artifact) -> pl.DataFrame:
    return pl.concat([read_parquet(described.read(name)) for name in described.names(".captions.parquet")])


def _group_texts(grouped: Artifact) -> pl.DataFrame:
    return read_parquet(grouped.read("groups.parquet"))


def _screened(
    domain: Domain, names: Sequence[str], found: Features, contents: Mapping[str, str], table: pl.DataFrame
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The table with flags and weights, in its own order; and the distinct texts with their features."""
    place = {key: row for row, key in enumerate(found.keys)}
    members = [tuple(keys) for keys in table["member_keys"].to_list()]
    # Keys are digests, so their order is as good as random, and the same wherever the images came from.
    subjects = sorted(set(members))
    subject = {keys: row for row, keys in enumerate(subjects)}
    labels = np.array([found.zero_shot[place[keys[0]]] for keys in subjects], np.int64)
    said = table["text"].fill_null("").to_list()
    model = clip.load(domain.clip)
    distinct = sorted(set(said))
    number = {text: row for row, text in enumerate(distinct)}
    features = model.text_features(distinct)
    result = screened(
        Texts(texts=distinct, features=features, too_long=model.too_long(distinct)),
        Subjects(
            features=_mean_features(found.features, [[place[key] for key in keys] for keys in subjects]),
            contents=[" ".join(sorted(contents[key] for key in keys)) for keys in subjects],
            labels=labels,
        ),
        Rows(
            keys=table["caption_key"].to_list(),
            text=np.array([number[text] for text in said], np.int64),
            subject=np.array([subject[keys] for keys in members], np.int64),
            index=table["index"].to_numpy(),
            finish_reasons=table["finish_reason"].fill_null("stop").to_list(),
            flags=table["flags"].fill_null([]).to_list(),
        ),
        names,
        domain.screen,
    )
    scores = {"clip_score": result.clip_score, "clip_score_shuffled": result.clip_score_shuffled}
    table = table.with_columns(
        label=pl.Series(labels[[subject[keys] for keys in members]], dtype=pl.Int64),
        text=pl.Series(said, dtype=pl.String),
        flags=pl.Series([list(flags) for flags in result.flags], dtype=pl.List(pl.String)),
        weight=pl.Series(result.weights, dtype=pl.Float32),
        **{name: pl.Series(values, dtype=pl.Float32).fill_nan(None) for name, values in scores.items()},
    ).select(*_COLUMNS, *scores)
    read = pl.DataFrame(
        {"text": distinct, "feature": features},
        schema={"text": pl.String, "feature": pl.Array(pl.Float32, model.dim)},
    )
    return table, read


def _mean_features(features: np.ndarray, members: Sequence[Sequence[int]]) -> np.ndarray:
    """Direction of the mean of some images' unit features each, ``(len(members), dim)`` float32."""
    counts = np.array([len(rows) for rows in members])
    flat = np.concatenate([np.array(rows) for rows in members])
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    total = np.add.reduceat(features[flat], starts, axis=0)
    return (total / np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-12)).astype(np.float32)


def _counts(table: pl.DataFrame) -> dict[str, int]:
    """Texts, flagged texts, those that are not used, and those that only the floor keeps."""
    flags = pl.col("flags")
    return {
        "texts": table.height,
        "flagged": table.filter(flags.list.len() > 0).height,
        "dropped": table.filter(pl.col("weight") == 0).height,
        "kept_by_floor": table.filter(flags.list.contains("kept_by_floor")).height,
    }


def read_screened(artifact: Artifact, kind: str, columns: list[str] | None = None) -> pl.DataFrame:
    """The table of image, group or class texts.

    Args:
        kind: images, groups or classes.
        columns: by default all.
    """
    return read_parquet(artifact.read(f"{kind}.parquet"), columns)


def read_text_features(artifact: Artifact, kind: str, texts: Sequence[str] | pl.Series) -> Matrix:
    """Unit features of some of the texts, ``(len(texts), dim)`` float32; zeros for a text that is not among them.

    Args:
        kind: images or groups.
    """
    from latteflow.models.rows import take

    distinct, features = _text_features(artifact, kind)
    known = distinct.to_frame("text").with_row_index("row")
    asked = pl.DataFrame({"text": texts}, schema={"text": pl.String})
    rows = asked.join(known, on="text", how="left", maintain_order="left")["row"]
    return take(features, rows.cast(pl.Int64).fill_null(-1).to_torch())


def _text_features(artifact: Artifact, kind: str) -> tuple[pl.Series, Matrix]:
    """The distinct texts about images or groups, and their unit features, ``(texts, dim)``; on disk where many."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        path = artifact.fetch(f"{kind}.features.parquet", Path(folder))
        texts = pl.read_parquet(path, columns=["text"])["text"]
        feature = pl.read_parquet_schema(path)["feature"]
        assert isinstance(feature, pl.Array)
        found, first = matrix(len(texts), feature.size), 0
        if isinstance(found, torch.Tensor):
            return texts, pl.read_parquet(path, columns=["feature"])["feature"].to_torch()
        import pyarrow.parquet as pq  # which takes memory itself

        with pq.ParquetFile(path, buffer_size=1 << 20) as file:
            for batch in file.iter_batches(1 << 14, columns=["feature"]):
                rows = batch.column(0).flatten().to_numpy().reshape(len(batch), -1)
                found[first : first + len(batch)] = torch.from_numpy(rows.copy())
                first += len(batch)
    return texts, found


def usable(table: pl.DataFrame) -> pl.DataFrame:
    """The texts that training uses: of each image or group the one of the highest weight, if that is not 0.

    Among equals the lowest index. Rows keep their order; a group that occurs twice stays twice.
    """
    members = pl.col("member_keys").list.join(" ").cast(pl.Categorical).to_physical()
    rows = table.select("index", "weight", members=members).with_row_index("row")  # the texts are not copied again
    best = rows.filter(pl.col("weight") > 0).sort("weight", "index", descending=[True, False])
    chosen = best.unique("members", keep="first", maintain_order=True)
    kept = rows.join(chosen, on=["members", "index"], how="semi", maintain_order="left")["row"]
    return table if len(kept) == table.height else table[kept]
