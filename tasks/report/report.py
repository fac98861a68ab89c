"""report: everything a run found out, as one HTML file."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from latteflow.models.judge.flat import flat
from latteflow.models.methods.registry import label
from latteflow.models.settings import own_zero_shot
from latteflow.models.texts.differences import RULES
from latteflow.models.texts.screening import FLAGS, FLOOR_WEIGHT
from latteflow.models.towers import clip
from latteflow.storage.artifacts import Artifact, ArtifactStore, ArtifactWriter
from latteflow.storage.objects import ObjectStore
from latteflow.storage.shards import overlap, read_index, read_quarantine, read_records
from latteflow.storage.tables import read_parquet
from latteflow.tasks.core.decode import opened
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.features import Features, read_features
from latteflow.tasks.core.stage import StageResult, open_store, run_stage, statistic
from latteflow.tasks.describe.pair import read_pairs
from latteflow.tasks.describe.screen import read_screened, usable
from latteflow.tasks.describe.texts import describer_identity
from latteflow.tasks.report import html, page
from latteflow.tasks.report.charts import Placed
from latteflow.tasks.report.scores import read_scores
from latteflow.tasks.report.slices import nearest
from latteflow.tasks.tune.models import read_history, read_tuned, tuned_features
from latteflow.tasks.tune.select import Selection, read_selection

VERSION = 3
EXAMPLES = 12
THUMBNAIL = 160
"""Longer side of an example's picture, in pixels."""
CAPTIONED_DROPPED = {"images": 90, "groups": 30}
"""Images and groups with a dropped text that the page shows at most."""
CAPTIONED_OTHERS = {"images": 45, "groups": 15}
CAPTIONED_OF_A_FLAG = 5
"""Of each flag at least so many are shown, if there are."""
PAIRS_KEPT, PAIRS_OF_A_RULE = 8, 4
"""Texts about pairs that the page shows."""
MEMBERS = 4
"""Pictures of a group."""
ON_THE_MAP = 2_000
CAPTION_THUMBNAIL = 96
DESCRIBER_NOTES = {
    "tags": "No language model took part: these are the CLIP's own zero-shot tags, put into sentences.",
    "sidecar": "These texts came with the images, and may name the class.",
}


def report(domain: Domain, *stages: StageResult) -> StageResult:
    """Collect the artifacts of a run, all of its stages, into ``report.html``."""
    store = open_store(domain)
    stages = tuple(dict.fromkeys(stages))
    inputs = {"stages": {stage.label: stage.ref.digest for stage in stages}, "domain": domain.name}

    def body(writer: ArtifactWriter) -> Mapping[str, int]:
        found = _Findings(domain, store, stages)
        writer.put("page", inputs, {"report.html": page.render(found.report()).encode()})
        return {}

    return run_stage(store, domain, "report", VERSION, inputs, body)


def publish(domain: Domain, scores: StageResult, page: StageResult) -> Path:
    """Put what people read into the output folder; returns the folder."""
    store = open_store(domain)
    folder = ObjectStore(str(Path(domain.output) / domain.name))
    folder.put("metrics.json", store.open(scores.ref).read("metrics.json"))
    folder.put("report.html", store.open(page.ref).read("report.html"))
    return Path(domain.output) / domain.name


def kept(domain: Domain, selection: Selection) -> str:
    """What the gate kept and why, in a sentence that says which zero-shot where it is that."""
    if selection.best is not None:
        return selection.told
    return f"{label(own_zero_shot(domain.clip.centre))}: {selection.told}"


class _Findings:
    """The artifacts of a run, opened, and what the page says of them."""

    def __init__(self, domain: Domain, store: ArtifactStore, stages: Sequence[StageResult]) -> None:
        self._domain, self._store, self._stages = domain, store, stages
        by_label = {stage.label: stage for stage in stages}
        self._open = {label: store.open(stage.ref) for label, stage in by_label.items()}
        self._train = self._open["shard train"]
        self._test = self._open.get("shard test", self._train)
        self._embedded = by_label["embed train"]
        self._scores = read_scores(self._open["evaluate"])
        self._table = read_parquet(self._open["evaluate"].read("predictions.parquet"))
        self._screened = {kind: read_screened(self._open["screen"], kind) for kind in ("images", "groups")}
        used = usable(self._screened["images"])
        self._texts = dict(zip(used["member_keys"].list.first(), used["text"], strict=True))
        self._selection = read_selection(self._open["select"])
        self._adapted, self._better = domain.method[0], self._scores.zero_shot.better

    def report(self) -> page.Report:
        better, worse, changed = self._examples()
        return page.Report(
            scores=self._scores,
            n_train=self._open["embed train"].counts["images"],
            model=self._model(),
            describer=self._describer(),
            counts=self._counts(),
            selection=kept(self._domain, self._selection),
            judged=self._selection.models,
            mistaken=self._mistaken(),
            atlas=self._atlas(),
            examples_better=better,
            examples_worse=worse,
            examples_changed=changed,
            screening=self._screening(),
            pairs=self._pairs() if "pair" in self._open else None,
            quarantine=self._quarantine(),
            stages=[self._stage(stage) for stage in self._stages],
            history=self._history(),
            lineage={stage.label: stage.ref.fingerprint for stage in self._stages},
            versions=self._open["evaluate"].manifest["versions"],
            seeds=self._domain.seeds,
        )

    def _model(self) -> page.Component:
        who = clip.identity(self._domain.clip)
        name = self._domain.clip.model + (f" ({who['pretrained']})" if who["pretrained"] else "")
        note = clip.EMBEDDED_NOTE if self._domain.clip.model == "embedded" else ""
        return page.Component(name=name, revision=str(who.get("revision", "")), note=note)

    def _describer(self) -> page.Component:
        who = describer_identity(self._domain, self._embedded)
        note = DESCRIBER_NOTES.get(self._domain.describer.kind, "")
        return page.Component(name=str(who["model"]), revision=str(who["revision"]), note=note)

    def _mistaken(self) -> dict[str, page.Mistaken]:
        """What the page shows of pairs of classes that are confused."""
        pairs = [pair for name in self._scores.methods for pair in self._scores.confused.get(name, ())[: page.CONFUSED]]
        keys = sorted({key for pair in pairs for key in pair.keys[: page.MISTAKEN]})
        paths, pictures = self._thumbnails(self._test, keys)
        told = self._told(keys)
        return {key: page.Mistaken(image=pictures[key], path=paths[key], text=told[key][1]) for key in keys}

    def _atlas(self) -> list[Placed]:
        """Images and prototypes of the first model on a plane; the images are a draw by key, which is a digest."""
        some = self._features.at(np.argsort(np.array(self._features.keys))[:ON_THE_MAP])
        tuned = read_tuned(self._open["tune"], self._domain.method[0], self._domain.seeds_of(self._domain.method[0])[0])
        features = tuned_features(self._domain, tuned, self._test, some)
        points = flat([features, tuned.prototypes])
        table = dict(zip(self._table["key"], self._table.iter_rows(named=True), strict=True))
        names = self._domain.classes
        placed = []
        for key, (x, y) in zip(some.keys, points.tolist(), strict=False):
            kind, told = self._on_the_map(table[key])
            placed.append(Placed(x, y, kind, told))
        for name, (x, y) in zip(names, points[len(placed) :].tolist(), strict=False):
            placed.append(Placed(x, y, "prototype", f"prototype of {name}", name))
        return placed

    def _on_the_map(self, row: Mapping[str, Any]) -> tuple[str, str]:
        """What became of an image, and the same in words."""
        names, truth = self._domain.classes, row["truth"]
        before, after = row[self._better], row[self._adapted]
        told = f"{names[after]} ({html.percent(row[f'{self._adapted}_probability'], 0)}), before {names[before]}"
        if truth is None:
            return ("gain" if before != after and not self._scores.n_test else "same"), f"{told}: {row['path']}"
        kind = "same" if (before == truth) == (after == truth) else "gain" if after == truth else "loss"
        return kind, f"{told}, labelled {names[truth]}: {row['path']}"

    def _counts(self) -> page.Counts:
        shards = [self._train] if self._test is self._train else [self._train, self._test]
        kinds = {"image": self._open["describe"].counts["texts"], "group": self._open["group"].counts["texts"]}
        if "pair" in self._open:
            kinds["pair"] = self._open["pair"].counts["texts"]
        return page.Counts(
            images=sum(each.counts["images"] for each in shards),
            quarantined=sum(each.counts["quarantined"] for each in shards),
            duplicates=sum(each.counts["duplicates"] for each in shards),
            overlap=overlap(self._train, self._test).height if len(shards) > 1 else 0,
            texts=sum(kinds.values()),
            texts_by_kind=kinds,
        )

    def _screening(self) -> page.Screening:
        """Numbers over all texts, and those that the page shows beside their images."""
        counts = {kind: Counter(table["flags"].explode().drop_nulls()) for kind, table in self._screened.items()}
        flags = [
            page.FlagRow(
                name=name,
                images=counts["images"][name],
                groups=counts["groups"][name],
                meaning=FLAGS[name].meaning if name in FLAGS else "set by the describer",
                effect=_effect(name),
            )
            for name, _ in sorted((counts["images"] + counts["groups"]).items(), key=lambda item: (-item[1], item[0]))
        ]
        # A reason stands where its text would.
        why = pl.format("(no text: {})", "detail")
        shown = pl.when((pl.col("text") == "") & (pl.col("detail").fill_null("") != "")).then(why).otherwise("text")
        picked: list[pl.DataFrame] = []
        with_dropped = others = 0
        for kind, table in self._screened.items():
            rows = table.with_columns(members=pl.col("member_keys").list.join(" ")).sort("index", maintain_order=True)
            entries = (
                rows.group_by("members")
                .agg(
                    dropped=(pl.col("weight") == 0).any(),
                    flags=pl.col("flags").explode().unique(),
                    key=pl.col("caption_key").min(),
                    texts=pl.struct(shown.alias("text"), "weight", "flags", "clip_score", "clip_score_shuffled"),
                    label=pl.col("label").first(),
                )
                .sort("key", "members")
            )
            dropped, rest = entries.filter("dropped"), entries.filter(~pl.col("dropped"))
            with_dropped, others = with_dropped + dropped.height, others + rest.height
            picked += [_pick(dropped, CAPTIONED_DROPPED[kind]), _pick(rest, CAPTIONED_OTHERS[kind])]
        chosen = pl.concat(picked).sort(~pl.col("dropped"), maintain_order=True)
        return page.Screening(
            texts=sum(table.height for table in self._screened.values()),
            dropped=self._open["screen"].counts["dropped"],
            kept_by_floor=self._open["screen"].counts["kept_by_floor"],
            flags=flags,
            with_dropped=with_dropped,
            others=others,
            shown=self._captioned(chosen),
        )

    def _captioned(self, entries: pl.DataFrame) -> list[page.Captioned]:
        members = [keys.split() for keys in entries["members"]]
        paths, pictures = self._thumbnails(self._train, [key for keys in members for key in keys[:MEMBERS]])
        return [
            page.Captioned(
                images=[pictures[key] for key in keys[:MEMBERS]],
                path=paths[keys[0]],
                label=self._domain.classes[label],
                captions=[page.Caption(**text) for text in texts],
                members=len(keys),
            )
            for keys, label, texts in zip(members, entries["label"], entries["texts"], strict=True)
        ]

    def _pairs(self) -> page.Pairs:
        """Numbers over all texts about pairs, and some that were kept or rejected by each rule."""
        table = read_pairs(self._open["pair"]).sort("pair_id")
        rules = table.drop_nulls("rule").group_by("rule").len().sort("len", "rule", descending=[True, False])
        turn = pl.int_range(pl.len()).over("rule") < pl.when(pl.col("rule").is_null()).then(PAIRS_KEPT).otherwise(
            PAIRS_OF_A_RULE
        )
        chosen = table.filter(turn).sort(pl.col("rule").is_not_null(), "rule", "pair_id")
        wanted = chosen["first"].to_list() + chosen["second"].to_list()
        paths, pictures = self._thumbnails(self._train, wanted)
        return page.Pairs(
            texts=table.height,
            kept=table["rule"].null_count(),
            rules=[page.RuleRow(name=rule, texts=n, meaning=RULES.get(rule, "")) for rule, n in rules.iter_rows()],
            shown=[
                page.Compared(
                    images=(pictures[row["first"]], pictures[row["second"]]),
                    paths=(paths[row["first"]], paths[row["second"]]),
                    text=row["text"] if row["rule"] is None else row["raw"] or row["detail"] or "",
                    rule=row["rule"] or "",
                )
                for row in chosen.iter_rows(named=True)
            ],
        )

    def _thumbnails(
        self, images: Artifact, keys: Sequence[str], side: int = CAPTION_THUMBNAIL
    ) -> tuple[dict[str, str], dict[str, bytes]]:
        """Paths and small pictures of images, by key."""
        index = read_index(images).filter(pl.col("key").is_in(list(set(keys))))
        pictures = {record.key: html.thumbnail(opened(record), side) for record in read_records(images, index)}
        return dict(index.select("key", "path").iter_rows()), pictures

    def _quarantine(self) -> list[page.QuarantineRow]:
        shards = [self._train] if self._test is self._train else [self._train, self._test]
        rows = pl.concat([read_quarantine(each).select("path", "reason", "detail") for each in shards])
        return [
            page.QuarantineRow(path=path, reason=reason, detail=detail) for path, reason, detail in rows.iter_rows()
        ]

    def _stage(self, stage: StageResult) -> page.StageRow:
        count = stage.counts.get("texts") or stage.counts.get("images")
        wait = statistic(self._store, self._open[stage.label], "engine_wait")
        tokens = _tokens(self._open[stage.label])
        return page.StageRow(
            name=stage.label,
            status="cached" if stage.cached else "computed",
            seconds=stage.seconds,
            images_per_s=count / stage.seconds if count and stage.seconds else None,
            fingerprint=stage.ref.fingerprint,
            counts=stage.counts,
            engine_wait=wait if wait is not None and 0 <= wait <= 1 else None,
            tokens=tokens,
            cost=_cost(self._domain, tokens) if tokens else "",
        )

    def _history(self) -> dict[str, list[float]]:
        records = read_history(self._open["tune"], self._adapted, self._domain.seeds[0])
        names = ("loss", "cosine", "agreement", "drift")
        return {name: [record[name] for record in records] for name in names if records and name in records[0]}

    def _examples(self) -> tuple[list[page.Example], list[page.Example], list[page.Example]]:
        """The most confident changes: to right, to wrong, and, without labels, at all."""
        before, after = self._better, self._adapted
        moved = self._table.filter(pl.col(before) != pl.col(after)).sort(
            f"{after}_probability", "key", descending=[True, False]
        )
        labelled = moved.filter(pl.col("truth").is_not_null())
        picks = [
            labelled.filter(pl.col(after) == pl.col("truth")).head(EXAMPLES),
            labelled.filter(pl.col(before) == pl.col("truth")).head(EXAMPLES),
            moved.head(0 if self._scores.n_test else EXAMPLES),
        ]
        chosen = pl.concat(picks)["key"].to_list()
        _, pictures = self._thumbnails(self._test, chosen, THUMBNAIL)
        told = self._told(chosen)
        return tuple([self._example(row, pictures, told) for row in pick.iter_rows(named=True)] for pick in picks)  # type: ignore[return-value]

    def _example(
        self, row: Mapping[str, Any], pictures: Mapping[str, bytes], told: Mapping[str, tuple[str, str]]
    ) -> page.Example:
        names, key = self._domain.classes, row["key"]
        kind, text = told[key]
        return page.Example(
            image=pictures[key],
            path=row["path"],
            before=names[row[self._better]],
            before_p=row[f"{self._better}_probability"],
            after=names[row[self._adapted]],
            after_p=row[f"{self._adapted}_probability"],
            truth=None if row["truth"] is None else names[row["truth"]],
            texts=[page.Text(kind=kind, text=text)] if text else [],
        )

    def _told(self, keys: Sequence[str]) -> dict[str, tuple[str, str]]:
        """A text for each of some images, and whose it is: its own, or that of the training image nearest to it."""
        train, test = read_features(self._open["embed train"]), self._features
        place = {key: row for row, key in enumerate(test.keys)}
        near, _ = nearest(test.features[[place[key] for key in keys]], train.features)
        beside = {key: train.keys[row] for key, row in zip(keys, near, strict=True)}
        return {
            key: ("image", self._texts[key])
            if key in self._texts
            else ("nearest training image", self._texts.get(beside[key], ""))
            for key in keys
        }

    @functools.cached_property
    def _features(self) -> Features:
        """Of the images that were evaluated."""
        return read_features(self._open.get("embed test", self._open["embed train"]))


def _tokens(artifact: Artifact) -> tuple[int, int] | None:
    """Of the prompts and the answers of the texts in an artifact; None where no language model wrote any."""
    if artifact.stage not in ("describe", "group", "pair"):
        return None
    tables = [read_parquet(artifact.read(name)) for name in artifact.names(".parquet")]
    # polars adds Int32 in 32 bits, and wraps.
    whole = pl.col("prompt_tokens", "output_tokens").cast(pl.Int64).sum()
    sums = [table.select(whole).row(0) for table in tables if "prompt_tokens" in table]
    prompt, output = (sum(int(each[place] or 0) for each in sums) for place in (0, 1))
    return (prompt, output) if prompt else None


def _cost(domain: Domain, tokens: tuple[int, int]) -> str:
    """By the token, where the domain file has prices."""
    prices = domain.prices.million_prompt_tokens, domain.prices.million_output_tokens
    if None in prices:
        return ""
    whole = sum(count * (price or 0.0) for count, price in zip(tokens, prices, strict=True)) / 1e6
    return f"{whole:.2f} {domain.prices.currency}"


def _effect(flag: str) -> str:
    if flag == "kept_by_floor":
        return f"weight {FLOOR_WEIGHT}"
    factor = FLAGS[flag].factor if flag in FLAGS else 1
    return "dropped" if not factor else f"weight × {factor}" if factor != 1 else ""


def _pick(entries: pl.DataFrame, count: int) -> pl.DataFrame:
    """Some entries: of each flag the first few by key, then the first by key; keys are digests, so this is a draw."""
    by_flag = entries.explode("flags").drop_nulls("flags").with_columns(rank=pl.int_range(pl.len()).over("flags"))
    chosen = by_flag.filter(pl.col("rank") < CAPTIONED_OF_A_FLAG)["members"].unique()
    return entries.sort(~pl.col("members").is_in(chosen.implode()), "key").head(count).sort("key")
