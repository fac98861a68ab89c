"""Puts the questions of a prompt pack to an engine, and reads its answers."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from latteflow.models.texts.collage import collage
from latteflow.models.texts.describers import Engine, EngineStopped, Item, Kind, Prompt, Text, tidy
from latteflow.models.towers.images import smaller, to_rgb

if TYPE_CHECKING:
    from PIL.Image import Image

BATCH, BATCH_S = 512, 10.0
"""Texts are handed on so many at a time, or after so many seconds, sooner at first: what a killed process may have to
ask for again, besides what is under way."""
HOPELESS = 16
"""So many failures of a model that never gave a text mean that it is not the images."""
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
        batch: texts that are handed on together.
        proven: the model gave texts before, so that failures are its prompts' fault, however many come first.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        longest_px: int,
        collage: bool = True,
        structured: bool = False,
        batch: int = BATCH,
        proven: bool = False,
    ) -> None:
        self.engine = engine.version
        self._model = engine
        self._longest_px, self._collage, self._structured = longest_px, collage, structured
        self._batch, self._proven = batch, proven

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
        failures = 0
        pause, since = 1.0, time.monotonic()
        try:
            for place, answer in self._model.generate(prompts):
                done[place] = text = self._read(answer)
                self._proven = self._proven or text.finish_reason != "error"
                failures += text.finish_reason == "error"
                if not self._proven and failures >= HOPELESS:
                    raise EngineStopped(
                        f"the model failed on each of the first {failures} prompts; the last time: {text.detail}"
                    )
                if len(done) >= self._batch or time.monotonic() - since >= min(pause, BATCH_S):
                    yield done
                    done, pause, since = {}, 2 * pause, time.monotonic()
        except Exception:
            if done:
                yield done
            raise
        if done:
            yield done

    def _view(self, item: Item) -> list[Image]:
        images = [smaller(to_rgb(image), self._longest_px) for image in item.images()]
        return [collage(images)] if self._collage and len(images) > 1 else images

    def _read(self, answer: Text) -> Text:
        """One line, the JSON taken off, and flags for how it ended."""
        if answer.finish_reason == "error":
            return answer
        text, is_cut = tidy(answer.text), answer.finish_reason == "length"
        if self._structured and text:
            try:
                text = tidy(_description(answer.text))
            except (ValueError, LookupError, TypeError, RecursionError):
                why = "ended before its JSON did; raise `max_tokens`" if is_cut else "is not JSON of the asked form"
                kept = replace(Text.failed(f"the answer {why}: {text}"), flags=(*answer.flags, "bad_json"))
                return replace(kept, prompt_tokens=answer.prompt_tokens, output_tokens=answer.output_tokens)
        ended = {"empty": not text, "cut": is_cut}
        return replace(answer, text=text, flags=(*answer.flags, *(flag for flag, holds in ended.items() if holds)))


def _description(answer: str) -> str:
    # Servers that do not constrain their model let it put the object into a code fence, or into a sentence.
    found = json.loads(answer[answer.find("{") : answer.rfind("}") + 1], strict=False)["description"]
    if not isinstance(found, str):
        raise TypeError(found)
    return found
