"""How often the texts speak of each class (7.2): what tells classes that are rare in them from the others."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

LEAST = 6


def concept_counts(texts: Iterable[str], classes: Sequence[str], *, least: int = LEAST) -> list[int]:
    """Texts in which each class name occurs as whole words, in the singular or with an s.

    The paper counts noun chunks of a parser; a class name is one, so looking for the name comes to the same but for
    names inside longer ones ("hot dog" speaks of a dog here).

    Args:
        least: a smaller count is 0: by chance.
    """
    patterns = [re.compile(rf"\b{re.escape(name.lower())}(s|es)?\b") for name in classes]
    counts = [0] * len(patterns)
    for text in texts:
        words = " ".join(text.lower().split())
        for place, pattern in enumerate(patterns):
            counts[place] += pattern.search(words) is not None
    return [count if count >= least else 0 for count in counts]
