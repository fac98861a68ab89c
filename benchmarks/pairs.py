"""PC-CLIP on domains: what its text tower learns of differences, and what that does to the classifier.

    python -m benchmarks.pairs domains/demo.yaml domains/clipart.yaml [--seeds 0 1 2] [--budget 5000] [--store URL]
    python -m benchmarks.pairs own.yaml --written

Images, features and descriptions come from the pipeline's own stages and its store. Texts about pairs are written by
the rule that compares words (`words`), about training images to learn from and about evaluation images to be tested on.
With `--written` they are those that the stage `pair` of the domain file got, from whatever language model it names, and
every fifth pair is held out. Pairs and order of batches are drawn anew for each seed. In percent, means over seeds with
their spread:

differences   share of held-out texts that the model holds to be true (6.1): those of the rule or model; and
class names   "The first image shows A, while the second image shows B instead." of images with these labels
zero-shot     top-1 of the plain class sentences
confused      top-1 among the classes of the three pairs that the untouched model confuses most, found without labels,
              with plain prompts and with comparative prompting (5.3, alpha 0.9, texts by the rule)
oracle        the same with the official choice: each model's own three largest cells of the confusion matrix on the
              test set. It looks at labels and is no method.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch

from benchmarks.accuracy import opened
from latteflow.models.methods.adaptation import PairData, TuneData
from latteflow.models.methods.pc_clip import PcClipSettings
from latteflow.models.methods.pc_clip.comparative import (
    compare_prompts,
    confused_pairs,
    difference_accuracy,
    difference_scores,
    oracle_pairs,
    soft_confusion,
    unit,
)
from latteflow.models.methods.pc_clip.pairs import draw_pairs
from latteflow.models.methods.pc_clip.tuning import PROJECTION_DRIFT, drift_matched_lr, tune_pairs
from latteflow.models.texts.describers.words import difference
from latteflow.models.texts.differences import read_difference
from latteflow.models.towers import clip
from latteflow.storage.shards import read_index
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.features import centred, read_features
from latteflow.tasks.core.stage import open_store
from latteflow.tasks.describe.describe import describe
from latteflow.tasks.describe.group import group
from latteflow.tasks.describe.pair import described, pair, read_pairs
from latteflow.tasks.describe.screen import screen
from latteflow.tasks.ingest.embed import embed
from latteflow.tasks.ingest.shard import Split, shard
from latteflow.tasks.report.labels import read_truth

HELD_OUT = 2000
CONFUSED = 3
Told = tuple[np.ndarray, np.ndarray, list[str]]
"""First and second image of each pair, and the text about it."""


@dataclass(frozen=True)
class Images:
    """One split: features as the classifier sees them, pseudo-labels, truth (-1: none), descriptions ("": none)."""

    keys: list[str]
    features: np.ndarray
    zero_shot: np.ndarray
    truth: np.ndarray
    captions: list[str]

    def texts(self, budget: int, seed: int) -> Told:
        """Pairs, and what the rule says of them."""
        number: dict[str, int] = {}
        said = [number.setdefault(text, len(number)) for text in self.captions]
        groups = np.where([text != "" for text in self.captions], self.zero_shot, -1)
        pairs = draw_pairs(groups, said, budget, "mixed", seed)
        found = [
            (i, j, kept.text)
            for i, j in zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)
            if (kept := read_difference(difference(self.captions[i], self.captions[j]).text)).rule is None
        ]
        first, second, texts = zip(*found, strict=True)
        return np.array(first), np.array(second), list(texts)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("domains", nargs="+", type=Path)
    options.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options.add_argument("--budget", type=int, default=5000)
    options.add_argument("--written", action="store_true", help="texts of the stage `pair`, which is run if it must be")
    options.add_argument("--averaging", type=float, default=1.0)
    options.add_argument("--lr-factor", type=float, default=1.0, help="times the default learning rate")
    options.add_argument("--store", help="instead of the domains' own")
    options.add_argument("--threads", type=int, default=1)
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    columns, rows = ["before", "after"], {}
    for path in chosen.domains:
        domain = opened(path, chosen.store)
        cfg = PcClipSettings(train="projection", averaging=chosen.averaging)
        texts = written(domain) if chosen.written else None
        rows[domain.name] = measured(domain, cfg, chosen.seeds, chosen.budget, chosen.lr_factor, texts)
    names = list(next(iter(rows.values())))
    lines = ["| | " + " | ".join(f"{name} {column}" for name in rows for column in columns) + " |"]
    lines.append("| --- |" + " --- |" * (2 * len(rows)))
    for name in names:
        cells = [f"{np.mean(v):.1f} ± {np.std(v):.1f}" for found in rows.values() for v in found[name]]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    sys.stdout.write("\n".join(lines) + "\n")


def written(domain: Domain) -> pl.DataFrame:
    """Keys and texts of the pairs that the domain's own stage kept; what became of all goes to standard error."""
    shards = shard(domain, "train")
    embedded = embed(domain, shards)
    texts, groups = describe(domain, shards, embedded), group(domain, shards, embedded)
    result = pair(domain, shards, embedded, screen(domain, shards, embedded, texts, groups))
    sys.stderr.write(f"{domain.name}: {json.dumps(dict(result.counts))}\n")
    return read_pairs(open_store(domain).open(result.ref)).filter(pl.col("status") == "kept")


def measured(
    domain: Domain, cfg: PcClipSettings, seeds: Sequence[int], budget: int, factor: float, table: pl.DataFrame | None
) -> dict[str, tuple[list[float], list[float]]]:
    """For each row of the table the figures of the seeds, before and after."""
    assert domain.evaluation is not None and domain.evaluation.source is not None
    model = clip.load(domain.clip)
    train, embeds, centre = split(domain, "train")
    # Texts that lie beside the images are looked up by their source.
    test, _, _ = split(domain.model_copy(update={"source": domain.evaluation.source}), "test", domain, centre)
    names = domain.prompt_names
    class_texts = model.text_features([text for prompts in domain.prompts() for text in prompts])
    templates = torch.from_numpy(class_texts).unflatten(0, (len(names), -1))
    found: dict[str, tuple[list[float], list[float]]] = {}

    def add(name: str, before: float, after: float) -> None:
        for values, value in zip(found.setdefault(name, ([], [])), (before, after), strict=True):
            values.append(100 * value)

    base = unit(templates.mean(1).numpy())
    logits = model.scale * train.features @ base.T
    probabilities = np.exp(logits - logits.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    label_free = confused_pairs(soft_confusion(probabilities), CONFUSED)

    for seed in seeds:
        if table is None:
            learnt, held, images = train.texts(budget, seed), test.texts(HELD_OUT, 1000 + seed), test
        else:
            learnt, held = halves(table, train.keys, seed)
            images = train
        first, second, texts = fitting(model, learnt)
        data = TuneData(
            pseudo_labels=torch.from_numpy(train.zero_shot.copy()),
            class_texts=templates,
            image_embeds=torch.from_numpy(embeds),
            centre=torch.from_numpy(centre),
            pairs=PairData(
                first=torch.from_numpy(first),
                second=torch.from_numpy(second),
                texts=torch.from_numpy(model.text_features(texts)),
            ),
        )
        begin = time.perf_counter()
        tuned = tune_pairs(scaled(cfg, len(texts), factor), data, seed=seed, scale=model.scale)
        sys.stderr.write(
            f"{domain.name} seed {seed}: {len(texts)} pairs, {len(set(texts))} texts, cosine "
            f"{tuned.history[0]['cosine']:.3f} -> {tuned.history[-1]['cosine']:.3f}, "
            f"{time.perf_counter() - begin:.0f} s\n"
        )
        assert tuned.text_map is not None
        change, after = tuned.text_map.numpy(), tuned.prototypes.numpy()

        def truths(told: Told, images: Images, change: np.ndarray = change) -> tuple[float, float]:
            i, j, said = told
            read = model.text_features(said)
            scores = [difference_scores(images.features[i], images.features[j], text) for text in (read, read @ change)]
            return difference_accuracy(scores[0]), difference_accuracy(scores[1])

        add("differences", *truths(held, images))
        add("differences, class names", *truths(labelled(test, names, seed), test))
        add("zero-shot", accuracy(test, base), accuracy(test, after))
        for kind in ("confused", "oracle"):
            results = []
            for prototypes, own in ((base, np.eye(len(change), dtype=np.float32)), (after, change)):
                pairs = label_free if kind == "confused" else oracle_pairs(confusion(test, prototypes), CONFUSED)
                about = model.text_features([difference(names[a], names[b]).text for a, b in pairs]) @ own
                compared = compare_prompts(prototypes, pairs, about)
                among = sorted({label for pair in pairs for label in pair})
                results.append((accuracy(test, prototypes, among), accuracy(test, compared, among)))
            add(f"{kind}, plain", results[0][0], results[1][0])
            add(f"{kind}, comparative", results[0][1], results[1][1])
    return found


def halves(table: pl.DataFrame, keys: Sequence[str], seed: int) -> tuple[Told, Told]:
    """Four fifths of the pairs and the rest; a pair of the rest may share an image with the others."""
    place = {key: row for row, key in enumerate(keys)}
    order = np.random.default_rng(seed).permutation(table.height)

    def told(rows: np.ndarray) -> Told:
        own = table[rows]
        first, second = (np.array([place[key] for key in own[name]]) for name in ("first", "second"))
        return first, second, own["text"].to_list()

    return told(order[len(order) // 5 :]), told(order[: len(order) // 5])


def fitting(model: clip.Clip, told: Told) -> Told:
    """Without the texts that are longer than the CLIP reads."""
    first, second, texts = told
    fits = ~model.too_long(texts)
    return first[fits], second[fits], [text for text, is_whole in zip(texts, fits, strict=True) if is_whole]


def scaled(cfg: PcClipSettings, n: int, factor: float) -> PcClipSettings:
    """With a multiple of the default learning rate."""
    lr = factor * drift_matched_lr(PROJECTION_DRIFT, -(-n // cfg.batch_size), cfg.epochs, cfg.decay)
    return cfg.model_copy(update={"lr": lr})


def labelled(test: Images, names: Sequence[str], seed: int) -> Told:
    """Pairs of images of different classes, and a sentence with the names of their classes."""
    draws, known = np.random.default_rng(seed), np.flatnonzero(test.truth >= 0)
    i, j = draws.choice(known, (2, HELD_OUT))
    different = test.truth[i] != test.truth[j]
    i, j = i[different], j[different]
    return i, j, [
        f"The first image shows {names[a]}, while the second image shows {names[b]} instead."
        for a, b in zip(test.truth[i], test.truth[j], strict=True)
    ]  # fmt: skip


def accuracy(test: Images, prototypes: np.ndarray, among: Sequence[int] | None = None) -> float:
    """Top-1, of images of some classes among these classes only (5.5), or of all."""
    classes = np.arange(len(prototypes)) if among is None else np.array(among)
    rows = np.isin(test.truth, classes)
    return float((classes[(test.features[rows] @ prototypes[classes].T).argmax(1)] == test.truth[rows]).mean())


def confusion(test: Images, prototypes: np.ndarray) -> np.ndarray:
    """Counts with labels, rows truth."""
    known = test.truth >= 0
    counts = np.zeros((len(prototypes),) * 2, int)
    np.add.at(counts, (test.truth[known], (test.features[known] @ prototypes.T).argmax(1)), 1)
    return counts


def split(
    texts_of: Domain, name: Split, domain: Domain | None = None, centre: np.ndarray | None = None
) -> tuple[Images, np.ndarray, np.ndarray]:
    """A split with its descriptions as the screen left them, its embeds, and what was subtracted from them."""
    domain = domain or texts_of
    store = open_store(domain)
    shards = shard(domain, name)
    embedded = embed(domain, shards)
    texts, groups = describe(texts_of, shards, embedded), group(texts_of, shards, embedded)
    screened = screen(texts_of, shards, embedded, texts, groups)
    found, captions = read_features(store.open(embedded.ref)), described(store.open(screened.ref))
    middle = centre if centre is not None else found.shift
    truth = np.full(len(found.keys), -1)
    if name == "test":
        paths = dict(read_index(store.open(shards.ref)).select("key", "path").iter_rows())
        truth = read_truth(domain, [paths[key] for key in found.keys])
    images = Images(
        keys=found.keys,
        features=centred(found.embeds, middle),
        zero_shot=found.zero_shot,
        truth=truth,
        captions=[captions.get(key, "") for key in found.keys],
    )
    return images, found.embeds, middle


if __name__ == "__main__":
    main()
