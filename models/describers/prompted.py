"""Puts the questions of a prompt pack to an engine, and reads its answers."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from models.collage import collage
from models.describers import Engine, EngineStopped, Item, Kind, Prompt, Text

if TYPE_CHECKING:
    from PIL.Image import Image

BATCH, PAUSE_S = 512, 10.0
"""Texts are handed on so many at a time, or after so many seconds, sooner at first: what a killed process may have to
ask for again, besides what is under way."""
HOPELESS = 16
"""So many failures before the first text mean that it is not the images."""
ANSWER: dict[str, Any] = {
    "type": "object",
    "properties": {"description": {"type": "string"}},
    "required": ["description"],
    "additionalProperties": False,
}
"""JSON schema of a structured answer."""


class Prompted:
    """A describer that asks a model.

    Args:
        engine: the model.
        longest_px: images are made smaller to have no longer side.
        collage: show a group as one picture (LatteCLIP 2.2); else as several images.
        structured: answers are JSON of the form ``ANSWER``.
    """

    def __init__(self, engine: Engine, *, longest_px: int, collage: bool = True, structured: bool = False) -> None:
        self.engine = engine.version
        self._model = engine
        self._longest_px, self._collage, self._structured = longest_px, collage, structured

    @property
    def waited(self) -> float:
        """Share of its time that the engine waited for images, 0 to 1."""
        return self._model.waited

    def describe(self, kind: Kind, items: Sequence[Item]) -> Iterator[dict[int, Text]]:
        """Texts by the place of their item, some at a time, as they come.

        Raises:
            EngineStopped: the engine died; or all of the first answers were failures.
        """
        del kind  # the prompt says it
        prompts = [Prompt(item.prompt, functools.partial(self._view, item), item.seed) for item in items]
        done: dict[int, Text] = {}
        failures, answered = 0, False
        pause, handed_on = 1.0, time.monotonic()
        try:
            for place, answer in self._model.generate(prompts):
                done[place] = text = self._read(answer)
                answered = answered or text.finish_reason != "error"
                failures += text.finish_reason == "error"
                if not answered and failures >= HOPELESS:
                    raise EngineStopped(
                        f"the model failed on each of the first {failures} prompts; the last time: {text.detail}"
                    )
                if len(done) >= BATCH or time.monotonic() - handed_on >= pause:
                    yield done
                    done, pause, handed_on = {}, min(2 * pause, PAUSE_S), time.monotonic()
        except EngineStopped:
            if done:
                yield done
            raise
        if done:
            yield done

    def _view(self, item: Item) -> list[Image]:
        images = [_smaller(image.convert("RGB"), self._longest_px) for image in item.images()]
        return [collage(images)] if self._collage and len(images) > 1 else images

    def _read(self, answer: Text) -> Text:
        """White space tidied, the JSON taken off, and flags for how it ended."""
        if answer.finish_reason == "error":
            return answer
        text = answer.text
        if self._structured:
            try:
                text = json.loads(text)["description"]
                assert isinstance(text, str)
            except (ValueError, LookupError, TypeError, AssertionError):
                kept = replace(Text.failed(f"the answer is not JSON of the asked form: {text!r}"), flags=("bad_json",))
                return replace(kept, prompt_tokens=answer.prompt_tokens, output_tokens=answer.output_tokens)
        text = " ".join(text.split())
        ended = {"empty": not text, "cut": answer.finish_reason == "length"}
        return replace(answer, text=text, flags=(*answer.flags, *(flag for flag, holds in ended.items() if holds)))


def _smaller(image: Image, longest_px: int) -> Image:
    if max(image.size) > longest_px:
        image.thumbnail((longest_px, longest_px))
    return image
