"""Domains x methods x seeds: top-1 in percent, with 95 % intervals and differences to the better zero-shot.

    python -m benchmarks.accuracy domains/demo.yaml domains/clipart.yaml [--imbalance 10 50] [--few-classes]
        [--cases inductive] [--methods transduction latteclip_plus] [--seeds 0 1 2] [--store runs/store] [--quick]

Zero-shot is there plain, domain-centred and estimated (models/judge/shift.py), which the methods start from, with the
ensemble of 80 templates that CLIP was published with, and with descriptions of the classes by a language model
(benchmarks/class_descriptions.py), both estimated. *shipped* is latteclip_plus where the gate
(models/judge/selection.py) accepts it, else estimated zero-shot. `--quick` is one seed, one draw and 160 steps of
training: the same tables in minutes, with other figures.
*others* has the texts of other images. *ceiling* is transduction with what the images' texts say (`beliefs.py` of
latteclip_plus) at the best of some weights by the test labels, *ceiling_groups* the same with the texts of an image's
groups: no methods.
*hindsight* is the best of the simple baselines (SIMPLE), chosen for each domain by its test labels: no method.

Images, features, texts and groups come from the pipeline's own stages and its store; nothing is made twice. Labels are
opened when everything has been predicted; they also choose the images of the variants. No method sees which variant,
domain or number of classes it is run on, and all have one configuration.

Inductive: adapted on the domain's images, tested on its evaluation images. Transductive: adapted and tested on the
evaluation images, whole, with a long tail (the largest class keeps its images, the smallest an N-th, geometrically),
or with a quarter of the classes. The variants are `--draws 3`, each with a seed of its own. Intervals resample the
images, not the seeds; the draws share images, so that theirs are somewhat narrow.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import open_clip
import polars as pl
import torch
from torch import Tensor

from benchmarks.class_descriptions import class_descriptions
from latteflow.models.judge.halves import Half, halves
from latteflow.models.judge.metrics import bootstrap_interval
from latteflow.models.judge.selection import Duel, Evidence, hardest_duel, hearing, judge, kappa, neighbours
from latteflow.models.judge.shift import centre_share
from latteflow.models.methods import registry
from latteflow.models.methods.adaptation import Adapted, TuneData
from latteflow.models.methods.latteclip import DEFAULT_STEPS, LatteClipSettings
from latteflow.models.methods.latteclip_plus.beliefs import beliefs, text_logits
from latteflow.models.methods.transduction import TransductionSettings
from latteflow.models.methods.transduction.tuning import nearest, transduce
from latteflow.models.towers import clip
from latteflow.models.vectors import unit
from latteflow.storage.shards import read_index
from latteflow.storage.tables import read_parquet
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.features import Features, read_features
from latteflow.tasks.core.stage import open_store
from latteflow.tasks.describe.describe import describe
from latteflow.tasks.describe.group import group
from latteflow.tasks.ingest.embed import embed
from latteflow.tasks.ingest.shard import Split, shard
from latteflow.tasks.report.labels import read_truth

Texts = Literal["own", "others", "none"]
"""About an image: its own, those of other images, or none."""
SHARE = 0.25
"""Of the classes, in the few-classes variant."""
WEIGHTS = 0.0, 0.1, 0.25, 0.5, 1.0, 2.0
"""Of which the ceiling has the best."""


@dataclass(frozen=True)
class Images:
    """One split of a domain: embeds `(n, dim)`, truth `(n,)`, text features with a mask, for images and groups, and
    features by the tower of `neighbours`, where the domain names one."""

    embeds: Tensor
    truth: np.ndarray
    texts: Tensor
    has_text: Tensor
    group_texts: Tensor
    members: list[np.ndarray]
    near: Tensor | None = None

    def only(self, rows: np.ndarray) -> Images:
        """Some of the images, and the groups they are all of."""
        place = {int(row): number for number, row in enumerate(rows)}
        whole = [g for g, members in enumerate(self.members) if all(int(m) in place for m in members)]
        members = [np.array([place[int(m)] for m in self.members[g]]) for g in whole]
        chosen = torch.from_numpy(rows)
        return Images(
            self.embeds[chosen], self.truth[rows], self.texts[chosen], self.has_text[chosen], self.group_texts[whole],
            members, None if self.near is None else self.near[chosen],
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Case:
    """What a method adapts to and is tested on; the same images where it is transductive.

    Args:
        class_texts: unit rows `(classes, dim)`.
        other_texts: the same by other prompts, made when they are first asked for, as a language model writes some.
        independent: the texts about images are not by `tags`.
    """

    train: Images
    test: Images
    class_texts: Tensor
    other_texts: Callable[[str], Tensor]
    scale: float
    independent: bool
    steps: int = DEFAULT_STEPS

    @functools.cached_property
    def centre(self) -> Tensor:
        return self.train.embeds.mean(0)

    @functools.cached_property
    def share(self) -> float:
        return centre_share(self.train.embeds, self.class_texts, self.scale)

    def features(self, images: Images, share: float | None = None) -> Tensor:
        return unit(images.embeds - (self.share if share is None else share) * self.centre)

    @property
    def settings(self) -> LatteClipSettings:
        return LatteClipSettings(epochs=math.ceil(self.steps / LatteClipSettings().n_steps(len(self.train.embeds))))

    def data(self, texts: Texts = "own", seed: int = 0) -> TuneData:
        """What the tuning methods are given; other images' texts by the seed."""
        train = self.train
        z = (self.features(train) @ self.class_texts.T).argmax(1)
        found = TuneData(
            pseudo_labels=z,
            class_texts=self.class_texts,
            image_embeds=train.embeds,
            centre=self.share * self.centre,
            near_features=train.near,
        )
        if texts == "none":
            return found
        draw = torch.Generator().manual_seed(seed)
        rows, groups = (
            torch.arange(n) if texts == "own" else torch.randperm(n, generator=draw)
            for n in (len(train.texts), len(train.group_texts))
        )
        found = replace(
            found,
            image_texts=train.texts[rows],
            has_image_text=train.has_text[rows],
            independent_texts=self.independent,
        )
        if not train.members:
            return found
        classes = torch.stack([z[torch.from_numpy(members)].mode().values for members in train.members])
        return replace(found, group_texts=train.group_texts[groups], group_classes=classes)


Predict = Callable[[Case, int], Tensor]
"""A method: the case and a seed to logits of the test images `(m, classes)`."""
Found = tuple[np.ndarray, float]
"""Of a method and domain: correct or not for each test image, `(m,)`; seconds."""


def zero_shot(share: float | None) -> Predict:
    return lambda case, seed: case.features(case.test, share) @ case.class_texts.T


def prompted(prompt: str) -> Predict:
    return lambda case, seed: case.features(case.test) @ case.other_texts(prompt).T


@functools.lru_cache(maxsize=8)
def tuned(method: str, case: Case, seed: int, texts: Texts) -> Adapted:
    settings = case.settings, TransductionSettings()
    return registry.adapt(method, case.data(texts, seed), *settings, seed=seed, scale=case.scale)


def answers(found: Adapted, case: Case, images: Images) -> Tensor:
    moved = images.embeds - case.share * case.centre
    return unit(moved if found.image_map is None else moved @ found.image_map) @ found.prototypes.T


def adapted(method: str, texts: Texts = "own") -> Predict:
    def predict(case: Case, seed: int) -> Tensor:
        found = tuned(method, case, seed, texts)
        if found.assignments is not None and case.test is case.train:
            return found.assignments
        return answers(found, case, case.test)

    return predict


def heard(data: TuneData, labels: Tensor, scale: float, parts: Iterable[Half] | None = None) -> Duel | None:
    """As `select` hears the images' texts of a model; None where these are worth nothing.

    Args:
        labels: by the model, `(n,)`.
        parts: of a model that has read the texts: models that have not read some of them, which are asked instead.
    """
    if data.image_texts is None or not data.independent_texts:
        return None
    x, classes = data.image_features, data.class_features
    near = nearest(x if data.near_features is None else data.near_features, TransductionSettings().neighbours)
    said = beliefs(x, classes, data.image_texts, data.has_image_text, scale, near).logits
    if said is None:
        return None
    own = (x @ classes.T).argmax(1)
    if parts is not None:
        labels = own.clone()
        for half in parts:
            labels[half.rows] = (half.features @ half.prototypes.T).argmax(1)
    return hearing(said, labels, own)


def shipped(case: Case, seed: int) -> Tensor:
    """What the gate lets through of the default method."""
    features, classes = case.features(case.train), len(case.class_texts)
    own = (features @ case.class_texts.T).argmax(1)
    labels = answers(tuned("latteclip_plus", case, seed, "own"), case, case.train).argmax(1)
    vouched = kappa(labels, own[neighbours(features)], classes)

    def adapt(data: TuneData) -> Adapted:
        settings = case.settings, TransductionSettings()
        return registry.adapt("latteclip_plus", data, *settings, seed=seed, scale=case.scale)

    data = case.data()
    told = heard(data, labels, case.scale, halves(data, adapt))
    spaces = [features] if case.train.near is None else [features, case.train.near]
    verdict = judge([Evidence(vouched, hardest_duel(spaces, labels, own))], case.share, told)
    return METHODS["latteclip_plus" if verdict.accepted else "zero_shot_estimated"](case, seed)


def ceiling(*, groups: bool) -> Predict:
    """Transduction with what texts about the images say, at the best weight by the labels of the test images."""

    def predict(case: Case, seed: int) -> Tensor:
        train, features, settings = case.train, case.features(case.train), TransductionSettings()
        texts, has_text = pooled(train) if groups else (train.texts, train.has_text)
        said = text_logits(case.class_texts, texts, has_text)[:]
        said *= (case.scale * features @ case.class_texts.T).std()
        found = []
        for weight in WEIGHTS:
            model = transduce(settings, features, case.class_texts, case.scale, weight * said)
            own = case.test is case.train
            found.append(model.assignments if own else case.features(case.test) @ model.prototypes.T)
        return max(found, key=lambda logits: np.mean(logits.argmax(1).numpy() == case.test.truth))

    return predict


def pooled(images: Images) -> tuple[Tensor, Tensor]:
    """Mean feature of the texts of the groups an image is in, `(n, dim)`, and whether there are any, `(n,)`."""
    found, has_text = torch.zeros_like(images.texts), torch.zeros_like(images.has_text)
    for members, text in zip(images.members, images.group_texts, strict=True):
        found[members] += text
        has_text[members] = True
    return found, has_text


METHODS: Mapping[str, Predict] = {
    "zero_shot_plain": zero_shot(0.0),
    "zero_shot_centred": zero_shot(1.0),
    "zero_shot_estimated": zero_shot(None),
    "zero_shot_ensemble": prompted("ensemble"),
    "zero_shot_descriptions": prompted("descriptions"),
    "flyp": adapted("flyp"),
    "wise_ft": adapted("wise_ft"),
    "self_training": adapted("self_training"),
    "transduction": adapted("transduction"),
    "latteclip_no_texts": adapted("latteclip", "none"),
    "latteclip": adapted("latteclip"),
    "latteclip_plus_no_texts": adapted("latteclip_plus", "none"),
    "latteclip_plus_others": adapted("latteclip_plus", "others"),
    "latteclip_plus": adapted("latteclip_plus"),
    "ceiling": ceiling(groups=False),
    "ceiling_groups": ceiling(groups=True),
    "shipped": shipped,
}
ZERO_SHOTS = (
    "zero_shot_plain", "zero_shot_centred", "zero_shot_estimated", "zero_shot_ensemble", "zero_shot_descriptions",
)  # fmt: skip
_UNSEEDED = [name for name, method in registry.METHODS.items() if not method.is_seeded]
WITHOUT_SEEDS = (*ZERO_SHOTS, *_UNSEEDED, "ceiling", "ceiling_groups")
BEFORE = ZERO_SHOTS[:2]
"""Gains are over the better of these."""
SIMPLE = (*ZERO_SHOTS, "flyp", "wise_ft", "self_training", "transduction")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("domains", nargs="+", type=Path)
    options.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    options.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options.add_argument("--imbalance", nargs="*", type=int, default=[])
    options.add_argument("--few-classes", action="store_true")
    options.add_argument("--draws", type=int, default=3, help="of each variant")
    options.add_argument(
        "--cases", nargs="*", choices=["inductive", "transductive"], default=["inductive", "transductive"]
    )
    options.add_argument("--store", help="instead of the domains' own")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--steps", type=int, default=DEFAULT_STEPS, help="of training")
    options.add_argument("--quick", action="store_true", help="one seed, one draw, 160 steps")
    chosen = options.parse_args()
    if chosen.quick:
        chosen.seeds, chosen.draws, chosen.steps = [0], 1, 160
    torch.set_num_threads(chosen.threads)
    methods = [name for name in METHODS if name in (*BEFORE, *chosen.methods)]
    rows: dict[str, dict[str, list[Found]]] = {}
    names = []
    for path in chosen.domains:
        domain = opened(path, chosen.store)
        names.append(domain.name)
        for kind, cases in build(
            domain, chosen.imbalance, chosen.few_classes, chosen.cases, chosen.draws, chosen.steps
        ):
            for method in methods:
                found = run(METHODS[method], cases, [0] if method in WITHOUT_SEEDS else chosen.seeds)
                rows.setdefault(kind, {}).setdefault(method, []).append(found)
                sys.stderr.write(f"{domain.name} {kind} {method} {100 * found[0].mean():.1f} {found[1]:.1f} s\n")
    for kind, table in rows.items():
        sys.stdout.write(f"\n### {kind}\n\n{markdown(names, table)}\n")


def run(method: Predict, cases: Sequence[Case], seeds: Sequence[int]) -> Found:
    """Correct or not for each test image, its mean over seeds, `(m,)`, all cases on end; seconds for one adaptation.

    One case is run with all seeds; of several each has its own.
    """
    begin = time.perf_counter()
    each = [seeds] if len(cases) == 1 else [[seeds[number % len(seeds)]] for number in range(len(cases))]
    said = [[method(case, seed).argmax(1).numpy() for seed in own] for case, own in zip(cases, each, strict=True)]
    seconds = (time.perf_counter() - begin) / sum(map(len, each))
    correct = [
        np.mean([labels == case.test.truth for labels in runs], axis=0) for runs, case in zip(said, cases, strict=True)
    ]
    return np.concatenate(correct), seconds


def best(table: Mapping[str, Sequence[Found]], names: Sequence[str]) -> list[Found]:
    """For each domain the best of some rows."""
    rows = [table[name] for name in names if name in table]
    return [max(of_domain, key=lambda found: found[0].mean()) for of_domain in zip(*rows, strict=True)]


def markdown(names: Sequence[str], table: Mapping[str, Sequence[Found]]) -> str:
    """A row for each method: top-1 with its interval, and its gain with its own, for each domain; means; seconds."""
    before = best(table, BEFORE)
    lines = [
        "| method | " + " | ".join(names) + " | mean | gain | s |",
        "| --- | " + "--- | " * len(names) + "--- | --- | --- |",
    ]
    for method, found in [*table.items(), ("hindsight", best(table, SIMPLE))]:
        cells = []
        for (correct, _), (base, _) in zip(found, before, strict=True):
            low, high = bootstrap_interval(correct)
            cell = f"{100 * correct.mean():.1f} ({100 * low:.1f} to {100 * high:.1f})"
            if method not in BEFORE:
                low, high = bootstrap_interval(correct - base)
                cell += f", {100 * (correct - base).mean():+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
            cells.append(cell)
        mean = 100 * np.mean([correct.mean() for correct, _ in found])
        gain = mean - 100 * np.mean([correct.mean() for correct, _ in before])
        seconds = np.mean([seconds for _, seconds in found])
        lines.append(f"| {method} | " + " | ".join(cells) + f" | {mean:.1f} | {gain:+.1f} | {seconds:.1f} |")
    return "\n".join(lines)


# --- cases ------------------------------------------------------------------------------------------------------------


def opened(path: Path, store: str | None) -> Domain:
    """The domain of a file, in its own store or another."""
    domain = Domain.load(path)
    return domain.model_copy(update={"store": str(Path(store).resolve())}) if store else domain


def build(
    domain: Domain,
    imbalance: Sequence[int],
    few: bool,
    cases: Sequence[str],
    draws: int = 3,
    steps: int = DEFAULT_STEPS,
) -> list[tuple[str, list[Case]]]:
    """The cases of a domain; the variants are several draws each."""
    train, test, class_texts = load(domain)
    prompts = functools.cache(functools.partial(other_texts, domain))
    settings = class_texts, prompts, clip.load(domain.clip).scale, domain.describer.kind != "tags", steps
    labelled = np.flatnonzero(test.truth >= 0)
    known = test.only(labelled) if len(labelled) < len(test.truth) else test
    found = []
    if "inductive" in cases:
        found.append(("inductive", [Case(train, known, *settings)]))
    if "transductive" in cases:
        found.append(("transductive", [Case(known, known, *settings)]))
    variants: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
        f"transductive, imbalance {ratio}": lambda draw, ratio=ratio: long_tail(known.truth, ratio, draw)  # type: ignore[misc]
        for ratio in imbalance
    }
    if few:
        variants["transductive, few classes"] = lambda draw: few_classes(known.truth, len(class_texts), draw)
    for name, rows in variants.items():
        parts = [known.only(rows(np.random.default_rng(seed))) for seed in range(draws)]
        found.append((name, [Case(part, part, *settings) for part in parts]))
    return found


def long_tail(truth: np.ndarray, ratio: int, draw: np.random.Generator) -> np.ndarray:
    """Rows of a part with a long tail: in a random order of the classes, shares go from 1 down to 1/ratio."""
    order = draw.permutation(np.unique(truth))
    rows = []
    for rank, label in enumerate(order):
        own = draw.permutation(np.flatnonzero(truth == label))
        rows.append(own[: max(1, round(len(own) * ratio ** (-rank / max(1, len(order) - 1))))])
    return np.sort(np.concatenate(rows))


def few_classes(truth: np.ndarray, classes: int, draw: np.random.Generator) -> np.ndarray:
    """Rows of the images of a quarter of the classes; all class names stay candidates."""
    present = np.unique(truth)
    kept = draw.permutation(present)[: max(2, round(SHARE * classes))]
    return np.flatnonzero(np.isin(truth, kept))


def load(domain: Domain) -> tuple[Images, Images, Tensor]:
    """Training and evaluation images, and the class texts' features, through the pipeline's stages."""
    if domain.evaluation is None or domain.evaluation.source is None:
        raise SystemExit(f"domain {domain.name!r} needs `evaluation:` with `source` and `labels`")
    train, found = split(domain, "train")
    # Texts that lie beside the images are looked up by their source.
    test, _ = split(domain, "test", domain.model_copy(update={"source": domain.evaluation.source}))
    return train, test, torch.from_numpy(found.class_features)


def other_texts(domain: Domain, prompt: str) -> Tensor:
    """Class features of OpenAI's templates, or of a language model's descriptions after the domain's own sentence."""
    names = domain.prompt_names
    if prompt == "ensemble":
        sentences = [[template(name) for template in open_clip.OPENAI_IMAGENET_TEMPLATES] for name in names]
    else:
        said = zip(domain.prompts(), class_descriptions(names), strict=True)
        sentences = [[f"{own[0]} {line}" for line in lines] for own, lines in said]
    features = clip.load(domain.clip).text_features([text for texts in sentences for text in texts])
    return torch.from_numpy(clip.class_features(features, len(sentences[0])))


def split(domain: Domain, name: Split, texts_of: Domain | None = None) -> tuple[Images, Features]:
    store, described_as = open_store(domain), texts_of or domain
    shards = shard(domain, name)
    embedded = embed(domain, shards)
    described, grouped = describe(described_as, shards, embedded), group(described_as, shards, embedded)
    found, captions = read_features(store.open(embedded.ref)), store.open(described.ref)
    table = pl.concat([read_parquet(captions.read(part)) for part in captions.names(".captions.parquet")])
    by_key = dict(zip(table["member_keys"].list.first(), table["text"], strict=True))
    texts = [by_key.get(key, "") for key in found.keys]
    groups = read_parquet(store.open(grouped.ref).read("groups.parquet")).filter(pl.col("text") != "")
    place = {key: row for row, key in enumerate(found.keys)}
    every = list(dict.fromkeys([*texts, *groups["text"]]))
    row = {text: number for number, text in enumerate(every)}
    features = torch.from_numpy(np.asarray(clip.load(domain.clip).text_features(every)))
    index = read_index(store.open(shards.ref)).filter(pl.col("key").is_in(found.keys))
    paths = dict(index.select("key", "path").iter_rows())
    truth = np.full(len(found.keys), -1)
    if name == "test":
        truth = read_truth(domain, [paths[key] for key in found.keys])
    return Images(
        embeds=torch.from_numpy(found.embeds),
        truth=truth,
        texts=features[[row[text] for text in texts]],
        has_text=torch.tensor([text != "" for text in texts]),
        group_texts=features[[row[text] for text in groups["text"]]],
        members=[np.array([place[key] for key in keys]) for keys in groups["member_keys"]],
        near=None if found.near_features is None else torch.from_numpy(found.near_features),
    ), found


if __name__ == "__main__":
    main()
