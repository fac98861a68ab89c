"""Putting a pack's questions to an engine, and reading what it says: with an engine that misbehaves on demand."""

import itertools
import json
import random
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from latteflow.models.texts.describers import EngineStopped, Item, Prompt, Text, tidy
from latteflow.models.texts.describers import prompted as module
from latteflow.models.texts.describers.prompted import HOPELESS, Prompted

Answer = Callable[[int, Prompt], Text]


class Fake:
    """Answers prompts in any order; ``stop_after`` so many it dies."""

    version, waited = "fake 1", 0.25

    def __init__(self, answer: Answer, stop_after: int | None = None, error: Exception | None = None) -> None:
        self.answer, self.stop_after, self.asked = answer, stop_after, 0
        self.error = error or EngineStopped("it died")

    def generate(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Text]]:
        order = list(enumerate(prompts))
        random.Random(len(order)).shuffle(order)
        for place, prompt in order:
            if self.asked == self.stop_after:
                raise self.error
            self.asked += 1
            yield place, self.answer(place, prompt)


def item(number: int = 0, *images: Image.Image) -> Item:
    return Item(("a.png",), lambda: np.zeros((1, 2)), lambda: list(images), f"question {number}", number)


def echo(_: int, prompt: Prompt) -> Text:
    return Text(f"answer to {prompt.text}, seed {prompt.seed}")


def said(text: str, *, structured: bool = False, reason: str = "stop", flags: tuple[str, ...] = ()) -> Text:
    """What becomes of one answer."""
    answer = Text(text, flags, reason, prompt_tokens=7, output_tokens=3)
    (found,) = Prompted(Fake(lambda *_: answer), longest_px=64, structured=structured).describe("image", [item()])
    return found[0]


def shown(images: Sequence[Image.Image], **settings: Any) -> list[Image.Image]:
    """What an engine sees of them."""
    seen: list[Image.Image] = []

    def look(_: int, prompt: Prompt) -> Text:
        seen.extend(prompt.images())
        return Text("x")

    list(Prompted(Fake(look), longest_px=64, **settings).describe("group", [item(0, *images)]))
    return seen


def test_texts_come_to_their_items_whatever_the_order_of_completion() -> None:
    batches = list(Prompted(Fake(echo), longest_px=64, batch=8).describe("image", [item(n) for n in range(20)]))
    assert [len(batch) for batch in batches] == [8, 8, 4]
    found = {place: text.text for batch in batches for place, text in batch.items()}
    assert found == {n: f"answer to question {n}, seed {n}" for n in range(20)}
    assert list(batches[0]) != sorted(batches[0])  # the engine did scramble


def test_a_slow_engines_texts_are_handed_on_before_a_batch_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(step=0.5)
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(module, "BATCH_S", 3.0)
    batches = list(Prompted(Fake(echo), longest_px=64).describe("image", [item(n) for n in range(24)]))
    assert [len(batch) for batch in batches] == [2, 4, 6, 6, 6]  # sooner at first


def test_nothing_asked_is_nothing_said() -> None:
    assert list(Prompted(Fake(echo), longest_px=64).describe("image", [])) == []


def test_what_an_answer_says_is_one_line_of_text_that_can_be_stored_anywhere() -> None:
    assert said("  A red\n\n  bird.\t ") == Text("A red bird.", prompt_tokens=7, output_tokens=3)
    assert said("a\x00b\x1b[31mred\x7f\x85\u2028x\x9by").text == "a b [31mred x y"
    assert said("猫 🐈 \ud83d cut off").text == "猫 🐈 cut off"  # half of a pair: no UTF-8 for it
    assert said("<b>'\"&{}\\").text == "<b>'\"&{}\\"
    assert said("long " * 2000).text == "long " * 1999 + "long"


@given(st.text(st.characters(codec=None)))
def test_tidy_leaves_what_utf8_can_hold_in_one_line(text: str) -> None:
    found = tidy(text)
    assert found.encode().decode() == found == tidy(found) and "  " not in found and len(found.splitlines()) <= 1
    kept = [c for c in text if not c.isspace() and unicodedata.category(c) not in ("Cc", "Cs")]
    assert [c for c in found if c != " "] == kept


@pytest.mark.parametrize(
    ("answer", "flags"),
    [
        (Text("a bird"), ()),
        (Text(" \n\x00"), ("empty",)),
        (Text("a bird on a", finish_reason="length"), ("cut",)),
        (Text("", finish_reason="length"), ("empty", "cut")),
        (Text("", ("filtered",)), ("filtered", "empty")),
        (Text.failed("no such image"), ("error",)),
    ],
)
@pytest.mark.parametrize("structured", [False, True])
def test_flags_say_how_it_ended(answer: Text, flags: tuple[str, ...], structured: bool) -> None:
    text = json.dumps({"description": answer.text}) if structured and tidy(answer.text) else answer.text
    found = said(text, structured=structured, reason=answer.finish_reason, flags=answer.flags)
    assert found.flags == flags and found.finish_reason == answer.finish_reason


@pytest.mark.parametrize(
    "text",
    [
        '{"description": "a red bird"}',
        ' {\n "description": "a red\\n bird", "confidence": 1}\n',
        '```json\n{"description": "a red bird"}\n```',
        'Sure! Here it is:\n{"description": "a red bird"}\nAnything else?',
        '{"description": "a red\nbird"}',
    ],
)
def test_json_is_taken_off_with_what_models_put_around_it(text: str) -> None:
    assert said(text, structured=True) == Text("a red bird", prompt_tokens=7, output_tokens=3)


@pytest.mark.parametrize(
    "text",
    [
        "a red bird", '"a red bird"', '{"text": "a red bird"}', '{"description": 7}', '{"description": null}', "{}",
        "[]", '{"description": "a"} {"description": "b"}', "null", "}{", '{"description": ' + "[" * 100_000 + "}",
    ],
)  # fmt: skip
def test_an_answer_that_is_not_the_asked_json_is_kept_as_an_error_with_its_price(text: str) -> None:
    found = said(text, structured=True)
    assert (found.text, found.flags, found.finish_reason) == ("", ("bad_json",), "error")
    assert (found.prompt_tokens, found.output_tokens) == (7, 3)
    assert found.detail.startswith("the answer is not JSON of the asked form: " + text[:20])
    assert len(found.detail) <= 500


def test_json_that_was_cut_says_what_to_raise() -> None:
    found = said('{"description": "a red bi', structured=True, reason="length")
    assert found.flags == ("bad_json",) and "raise `max_tokens`" in found.detail
    whole = said('{"description": "a red bird"}', structured=True, reason="length")
    assert whole.text == "a red bird" and whole.flags == ("cut",)


def test_an_empty_description_is_empty_and_no_error() -> None:
    found = said('{"description": " "}', structured=True)
    assert found.flags == ("empty",) and found.finish_reason == "stop"


def test_images_are_decoded_only_when_the_engine_asks() -> None:
    decoded: list[int] = []

    def lazily(number: int) -> Item:
        def images() -> list[Image.Image]:
            decoded.append(number)
            return [Image.new("RGB", (8, 8))]

        return Item((), lambda: np.zeros((1, 2)), images, "?", 0)

    def look(place: int, prompt: Prompt) -> Text:
        if place % 2:
            prompt.images()
        return Text("x")

    texts = Prompted(Fake(look), longest_px=64).describe("image", [lazily(n) for n in range(10)])
    assert decoded == []
    list(texts)
    assert sorted(decoded) == [1, 3, 5, 7, 9]


@pytest.mark.parametrize(
    ("size", "becomes"), [((200, 100), (64, 32)), ((90, 900), (6, 64)), ((64, 64), (64, 64)), ((20, 10), (20, 10))]
)
def test_images_become_smaller_and_keep_their_shape(size: tuple[int, int], becomes: tuple[int, int]) -> None:
    image = Image.new("RGB", size, "red")
    (seen,) = shown([image])
    assert seen.size == becomes and seen.getpixel((0, 0)) == (255, 0, 0)
    assert image.size == size  # it is the caller's


def test_a_model_sees_pictures_as_people_do() -> None:
    transparent = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    grey = Image.fromarray(np.full((8, 8), 32_896, np.uint16))
    sideways = Image.new("RGB", (8, 4))
    sideways.getexif()[0x0112] = 6
    palette = Image.new("P", (8, 8))
    palette.info["transparency"] = 0
    seen = [shown([image])[0] for image in (transparent, grey, sideways, palette)]
    assert [image.mode for image in seen] == ["RGB"] * 4
    assert seen[0].getpixel((4, 4)) == (255, 255, 255) and seen[3].getpixel((4, 4)) == (255, 255, 255)
    assert seen[1].getpixel((4, 4)) == (128, 128, 128)
    assert seen[2].size == (4, 8)


def test_a_group_is_one_picture_or_several() -> None:
    images = [Image.new("RGB", (100, 50), colour) for colour in ("red", "lime", "blue")]
    (one,) = shown(images)
    assert one.size == (672, 672) and one.getpixel((163, 163)) == (255, 0, 0)
    assert [image.size for image in shown(images, collage=False)] == [(64, 32)] * 3
    assert [image.size for image in shown(images[:1])] == [(64, 32)]  # an image is no group


@pytest.mark.parametrize("error", [EngineStopped("it died"), RuntimeError("a bug")])
def test_what_came_before_an_engine_stopped_is_handed_on(error: Exception) -> None:
    texts = Prompted(Fake(echo, 13, error), longest_px=64, batch=5).describe("image", [item(n) for n in range(40)])
    kept: dict[int, Text] = {}
    with pytest.raises(type(error), match=str(error)):
        for batch in texts:
            kept |= batch
    assert len(kept) == 13 and all(text.text.startswith(f"answer to question {n}") for n, text in kept.items())


def fails(_: int, __: Prompt) -> Text:
    return Text.failed("this model has no eyes")


def test_a_model_that_only_fails_is_stopped_soon() -> None:
    engine = Fake(fails)
    kept: dict[int, Text] = {}
    with pytest.raises(EngineStopped, match=rf"each of the first {HOPELESS} prompts.*this model has no eyes"):
        for batch in Prompted(engine, longest_px=64).describe("image", [item(n) for n in range(100)]):
            kept |= batch
    assert engine.asked == HOPELESS == len(kept)


def test_a_few_failures_are_rows() -> None:
    (found,) = Prompted(Fake(fails), longest_px=64).describe("image", [item(n) for n in range(HOPELESS - 1)])
    assert {text.finish_reason for text in found.values()} == {"error"}


def test_after_one_text_any_number_of_failures_are_rows() -> None:
    engine = Fake(lambda *_: Text("one") if engine.asked == HOPELESS else Text.failed("broken"))
    (found,) = Prompted(engine, longest_px=64).describe("image", [item(n) for n in range(100)])
    assert len(found) == 100


def test_a_model_that_is_proven_is_not_stopped_by_its_first_images() -> None:
    (found,) = Prompted(Fake(fails), longest_px=64, proven=True).describe("image", [item(n) for n in range(40)])
    assert len(found) == 40


def test_an_empty_answer_is_an_answer_and_bad_json_is_none() -> None:
    (found,) = Prompted(Fake(lambda *_: Text("")), longest_px=64).describe("image", [item(n) for n in range(40)])
    assert len(found) == 40
    with pytest.raises(EngineStopped, match="is not JSON of the asked form: hello"):
        list(Prompted(Fake(lambda *_: Text("hello")), longest_px=64, structured=True).describe("image", [item()] * 40))


def test_why_a_text_failed_is_one_short_line() -> None:
    assert Text.failed(MemoryError()).detail == "MemoryError"
    assert Text.failed("a\n\x00b\ud800").detail == "a b"
    assert len(Text.failed("x" * 10_000).detail) == 500


def test_the_engine_names_itself() -> None:
    describer = Prompted(Fake(echo), longest_px=64)
    assert describer.engine == "fake 1" and describer.waited == 0.25
