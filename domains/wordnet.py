"""Makes ``imagenet_wordnet.json.gz`` from WordNet 3.0 and the list of ImageNet classes; same inputs, same bytes.

    python -m domains.wordnet /usr/share/wordnet/data.noun

An ImageNet class id is "n" and the byte offset of a WordNet 3.0 noun synset. A hypernym is kept when it stands above 2
to 300 of the 1000 classes: below that it is one class under another name, above it ("entity") it says nothing.
"""

import gzip
import json
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import timm

from latteflow.models.data.wordnet import TABLE

FEWEST_LEAVES, MOST_LEAVES = 2, 300


class Synset(NamedTuple):
    lemmas: list[str]
    gloss: str
    hypernyms: list[str]


def read_nouns(path: Path) -> dict[str, Synset]:
    """Every noun synset of a WordNet 3.0 ``data.noun`` file by its id (wndb(5) describes the line)."""
    nouns = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("  "):  # the licence at the head of the file
            continue
        fields, _, gloss = line.partition(" | ")
        offset, _, _, n_lemmas, *rest = fields.split()
        n = int(n_lemmas, 16)
        lemmas = [lemma.replace("_", " ") for lemma in rest[: 2 * n : 2]]
        pointers = rest[2 * n + 1 :]
        hypernyms = ["n" + pointers[i + 1] for i in range(0, 4 * int(rest[2 * n]), 4) if pointers[i] in ("@", "@i")]
        definition = gloss.split('; "')[0].strip()  # examples of use follow, in quotes
        nouns["n" + offset] = Synset(lemmas, definition, hypernyms)
    return nouns


def ancestors(wnid: str, nouns: dict[str, Synset]) -> list[str]:
    """All hypernyms over every path, nearest first."""
    found: list[str] = []
    queue = [wnid]
    while queue:
        for hypernym in nouns[queue.pop(0)].hypernyms:
            if hypernym not in found:
                found.append(hypernym)
                queue.append(hypernym)
    return found


def main(data_noun: Path) -> None:
    nouns = read_nouns(data_noun)
    info = Path(timm.__file__).parent / "data" / "_info" / "imagenet_synsets.txt"
    chains = {wnid: ancestors(wnid, nouns) for wnid in info.read_text().split()}
    n_leaves = Counter(node for chain in chains.values() for node in chain)
    kept = sorted(node for node, n in n_leaves.items() if FEWEST_LEAVES <= n <= MOST_LEAVES)

    def entry(wnid: str) -> dict[str, object]:
        return {"wnid": wnid, "lemmas": nouns[wnid].lemmas, "gloss": nouns[wnid].gloss}

    table = {
        "classes": [entry(wnid) | {"ancestors": chain} for wnid, chain in chains.items()],
        "hypernyms": [entry(wnid) for wnid in kept],
    }
    body = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    TABLE.write_bytes(gzip.compress(body, compresslevel=9, mtime=0))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
