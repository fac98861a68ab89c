"""The real engine on CPU: what it is given, what comes back, and what it survives. Runs in the vLLM environment."""

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from latteflow.models.errors import ModelError
from latteflow.models.settings import VllmSettings
from latteflow.models.texts.describers import Item, Prompt, Text
from latteflow.models.texts.describers.prompted import Prompted

pytest.importorskip("vllm")

CONTEXT, BATCH = 256, 8


@pytest.fixture(scope="module")
def settings(tiny_vlm: Path) -> VllmSettings:
    extra = {"enforce_eager": True}
    return VllmSettings(
        kind="vllm",
        model=str(tiny_vlm),
        dtype="float32",
        max_context=CONTEXT,
        max_batch=BATCH,
        max_tokens=12,
        extra=extra,
    )


@pytest.fixture(scope="module")
def engine(settings: VllmSettings) -> Any:
    from latteflow.models.texts.describers.vllm import open_vllm

    return open_vllm(settings)


def picture(number: int) -> list[Image.Image]:
    return [Image.new("RGB", (40 + number % 3, 32), (7 * number % 256, number, 200))]


def ask(engine: Any, prompts: list[Prompt]) -> list[Text]:
    found = dict(engine.generate(prompts))
    assert sorted(found) == list(range(len(prompts)))
    return [found[place] for place in range(len(prompts))]


def prompts(count: int) -> list[Prompt]:
    return [Prompt(f"Describe picture {n % 5}.", lambda n=n: picture(n), seed=n) for n in range(count)]


def test_texts_depend_on_their_prompt_alone(engine: Any) -> None:
    asked = prompts(3 * BATCH)
    found = ask(engine, asked)
    assert len({each.text for each in found}) > BATCH  # noise, and not the same noise
    assert all(0 < each.output_tokens <= 12 and each.prompt_tokens > 0 for each in found)
    assert ask(engine, asked) == found
    assert ask(engine, asked[::-1]) == found[::-1]


def test_one_bad_prompt_is_one_row(engine: Any) -> None:
    def broken() -> list[Image.Image]:
        raise OSError("image file is truncated")

    asked = prompts(6)
    asked[1] = Prompt("Describe.", broken, 1)
    asked[2] = Prompt("far too long " * CONTEXT, lambda: picture(2), 2)
    asked[4] = Prompt("Describe.", lambda: picture(4) * 5, 4)  # more images than a prompt may have
    found = ask(engine, asked)
    assert [each.finish_reason == "error" for each in found] == [False, True, True, False, True, False]
    assert "truncated" in found[1].detail and str(CONTEXT) in found[2].detail and found[4].detail
    assert [found[place] for place in (0, 3, 5)] == [ask(engine, prompts(6))[place] for place in (0, 3, 5)]


def test_no_more_than_a_few_images_are_decoded_ahead(engine: Any) -> None:
    from latteflow.models.texts.describers.vllm import AHEAD

    decoded, lock, most = 0, threading.Lock(), 0

    def decode(number: int) -> list[Image.Image]:
        nonlocal decoded
        with lock:
            decoded += 1
        return picture(number)

    asked = [Prompt("Describe.", lambda n=n: decode(n), n) for n in range(200)]
    for done, _ in enumerate(engine.generate(asked)):
        most = max(most, decoded - done)
    assert decoded == 200 and most <= AHEAD + 2 * BATCH + 1
    assert 0 <= engine.waited < 1


def test_a_reader_that_goes_away_leaves_the_engine_fit(engine: Any) -> None:
    reader: Iterator[tuple[int, Text]] = engine.generate(prompts(40))
    next(reader)
    reader.close()  # type: ignore[attr-defined]
    assert len(ask(engine, prompts(4))) == 4


def test_other_questions_start_no_other_engine(engine: Any, settings: VllmSettings) -> None:
    from latteflow.models.texts.describers.vllm import open_vllm

    assert open_vllm(settings.model_copy(update={"prompts": "base", "longest_px": 64})) is engine


def test_several_images_and_none(engine: Any) -> None:
    many = ask(engine, [Prompt("What do they share?", lambda: [each for n in range(4) for each in picture(n)], 0)])
    none = ask(engine, [Prompt("What is a robin?", list, 0)])
    assert many[0].prompt_tokens > none[0].prompt_tokens > 0


def test_a_plan_reckons_with_as_many_tokens_as_the_engine_counts(engine: Any, settings: VllmSettings) -> None:
    """Of the families that need torchvision, which is not here, `python -m benchmarks.tokens` shows it."""
    from latteflow.models.texts.describers.tokens import prompt_tokens

    shown: list[list[tuple[int, int]]] = [[], [(64, 48)], [(300, 500)], [(40, 32)] * 4]
    asked = [Prompt("Describe.", lambda sizes=sizes: [Image.new("RGB", size) for size in sizes], 0) for sizes in shown]
    found = [each.prompt_tokens for each in ask(engine, asked)]
    assert found == [prompt_tokens(settings, [("Describe.", sizes)]) for sizes in shown] and len({*found}) == 3


def test_slow_images_do_not_stop_the_engine(engine: Any) -> None:
    def slow(number: int) -> list[Image.Image]:
        time.sleep(0.5)
        return picture(number)

    found = ask(engine, [Prompt("Describe.", lambda n=n: slow(n), n) for n in range(24)])
    assert all(each.finish_reason != "error" for each in found)
    assert engine.waited > 0.1


def test_structured_answers_are_json_and_are_taken_out(settings: VllmSettings) -> None:
    from latteflow.models.texts.describers.vllm import open_vllm

    structured = open_vllm(settings.model_copy(update={"structured": True, "max_tokens": 60}))
    items = [Item((), lambda: None, lambda n=n: picture(n), "Describe.", n) for n in range(6)]
    found = {place: text for batch in Prompted(structured, longest_px=64, structured=True).describe("image", items)
             for place, text in batch.items()}  # fmt: skip
    assert sorted(found) == list(range(6))
    for text in found.values():  # a tiny model may not find the end of its string
        assert text.flags == ("bad_json",) or (text.finish_reason == "stop" and "{" not in text.text[:1])


def test_a_base_model_goes_on_with_the_question_to_the_end_of_the_line(
    settings: VllmSettings, tiny_vlm: Path, tmp_path: Path
) -> None:
    from latteflow.models.texts.describers.vllm import open_vllm

    folder = shutil.copytree(tiny_vlm, tmp_path / "base", ignore=shutil.ignore_patterns("chat_template.jinja"))
    base = open_vllm(settings.model_copy(update={"model": str(folder), "temperature": 1.0, "max_tokens": 200}))
    words, number = "Q: What is it?\nA:", len(base.llm.get_tokenizer()("Q: What is it?\nA:")["input_ids"])
    shown, *found = ask(base, [Prompt(words, lambda: picture(1), 0), *(Prompt(words, list, n) for n in range(30))])
    assert {each.prompt_tokens for each in found} == {number}  # no words of a template
    assert shown.prompt_tokens > number and shown.finish_reason != "error"
    assert not any("\n" in each.text for each in found)
    assert any(each.finish_reason == "stop" for each in found)


@pytest.mark.parametrize("model", ["/no/such/model", "no-such-organization/no-such-model"])
def test_a_model_that_is_not_there_is_one_clear_error(settings: VllmSettings, model: str) -> None:
    from latteflow.models.texts.describers.vllm import open_vllm

    with pytest.raises(ModelError, match=f"vLLM cannot start with model '{model}'.*Check the name or path"):
        open_vllm(settings.model_copy(update={"model": model}))
