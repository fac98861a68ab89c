"""The 1000 ImageNet classes with their WordNet 3.0 names, glosses and ancestors (README.md: origin and licence)."""

import gzip
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

TABLE = Path(__file__).with_name("imagenet_wordnet.json.gz")


@dataclass(frozen=True)
class Synset:
    """A WordNet noun: an ImageNet class (one leaf) or a hypernym of 2 to 300 classes."""

    wnid: str
    lemmas: tuple[str, ...]
    """Names, the most usual first."""
    gloss: str
    leaves: tuple[int, ...]
    """Indices of the ImageNet classes at or under it, ascending."""


@cache
def synsets() -> tuple[Synset, ...]:
    """The 1000 classes in class order, then the hypernyms in order of their id."""
    table = json.loads(gzip.decompress(TABLE.read_bytes()))
    leaves: dict[str, list[int]] = {}
    for index, row in enumerate(table["classes"]):
        for wnid in (row["wnid"], *row["ancestors"]):
            leaves.setdefault(wnid, []).append(index)
    rows = table["classes"] + table["hypernyms"]
    return tuple(Synset(r["wnid"], tuple(r["lemmas"]), r["gloss"], tuple(leaves[r["wnid"]])) for r in rows)
