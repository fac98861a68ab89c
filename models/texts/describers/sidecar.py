"""sidecar: texts that came with the images (alt texts, titles, keywords). They may name the class; results say so."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from latteflow.models.texts.describers import Item, Kind, Text

_WORD = re.compile(r"[^\W\d_]{2,}")


class Sidecar:
    """Looks texts up instead of writing them.

    Args:
        texts: path below the source -> text.
    """

    def __init__(self, texts: Mapping[str, str]) -> None:
        self._texts = texts

    engine = "sidecar"

    def describe(self, kind: Kind, items: Sequence[Item]) -> Iterator[dict[int, Text]]:
        """The image's own text; for a group, the words that most of its members' texts share."""
        yield {place: self._one(item) if kind == "image" else self._common(item) for place, item in enumerate(items)}

    def _one(self, item: Item) -> Text:
        text = " ".join(self._texts.get(item.paths[0], "").split())
        return Text(text) if text else Text("", ("missing",))

    def _common(self, item: Item) -> Text:
        texts = [self._texts.get(path, "") for path in item.paths]
        seen = Counter(word for text in texts for word in dict.fromkeys(_WORD.findall(text.lower())))
        common = [word for word, count in seen.items() if 2 * count > len(texts)]
        return Text(", ".join(common)) if common else Text("", ("missing",))
