"""words: what words one description has and another lacks. A rule, no language model; it knows but the words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from latteflow.models.texts.describers import Item, Kind, Text

REVISION = "1"
"""Raised whenever the texts change."""
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_SAID_OF_ANYTHING = frozenset(
    re.findall(
        r"\w+",
        """
    a an and are as at be being by can for from has have having in into is it its like of on or other picture pictures
    photo photos image images some something such than that the their them there these this those to was which while
    with common
    """,
    )
)


class Words:
    """The describer. An item has two captions."""

    engine = "words"

    def describe(self, kind: Kind, items: Sequence[Item]) -> Iterator[dict[int, Text]]:
        """One sentence for each item: what the first has and the second lacks, and the other way round."""
        yield {place: difference(*item.captions) for place, item in enumerate(items)}


def difference(first: str, second: str) -> Text:
    """ "The first image shows a b, while the second image shows c." of "a b d" and "c d"."""
    mine, others = ({word.casefold() for word in _WORD.findall(text)} for text in (first, second))
    has, lacks = _phrases(first, others), _phrases(second, mine)
    if has and lacks:
        return Text(f"The first image shows {has}, while the second image shows {lacks} instead.")
    if has:
        return Text(f"The first image shows {has}, which the second image does not show.")
    if lacks:
        return Text(f"The first image does not show {lacks}, which the second image does show.")
    return Text("", ("missing",))


def _phrases(text: str, besides: set[str]) -> str:
    """The words that are not among others, those that stand side by side together, each once."""
    phrases: list[list[str]] = []
    end = -1
    for found in _WORD.finditer(text):
        if found[0].casefold() in besides | _SAID_OF_ANYTHING:
            continue
        if phrases and text[end : found.start()].isspace():
            phrases[-1].append(found[0])
        else:
            phrases.append([found[0]])
        end = found.end()
    return ", ".join(dict.fromkeys(" ".join(phrase) for phrase in phrases))
