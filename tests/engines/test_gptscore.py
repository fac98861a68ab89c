"""GPTScore on the real engine: likelihoods are those that the model itself has. Runs in the vLLM environment."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.gptscore import gptscores
from latteflow.models.settings import VllmSettings
from latteflow.models.texts.describers.vllm import open_vllm

pytest.importorskip("vllm")

NAMES = ["robin", "ruby-throated hummingbird", "wren"]
PICTURES = [Image.new("RGB", (40, 32), colour) for colour in ((200, 30, 30), (40, 60, 220))]


@pytest.fixture(scope="module")
def llm(tiny_vlm: Path) -> Any:
    settings = VllmSettings(
        kind="vllm", model=str(tiny_vlm), dtype="float32", max_context=256, max_batch=8, extra={"enforce_eager": True}
    )
    return open_vllm(settings).llm


def reference(folder: Path, image: Image.Image, answer: str) -> list[float]:
    """Log-probabilities of an answer's tokens by transformers."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    content = [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]
    chat = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    text = processor.apply_chat_template(chat, add_generation_prompt=False, continue_final_message=True)
    inputs = processor(text=text, images=[image], return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[0].log_softmax(-1)
    ids = inputs["input_ids"][0]
    before = processor.tokenizer(text[: text.rindex(answer)])["input_ids"]
    n = len(processor.tokenizer(text)["input_ids"]) - len(before)
    return [float(logits[place - 1, ids[place]]) for place in range(len(ids) - n, len(ids))]


def test_scores_are_the_models_own_likelihoods(llm: Any, tiny_vlm: Path) -> None:
    found = {kind: gptscores(llm, PICTURES, NAMES, normalise=kind) for kind in ("mean", "sum", "class_tokens_mean")}
    assert all(scores.shape == (2, 3) and (scores < 0).all() for scores in found.values())
    for row, image in enumerate(PICTURES):
        for column, name in enumerate(NAMES):
            logprobs = reference(tiny_vlm, image, f"A photo of {name}")
            assert found["sum"][row, column] == pytest.approx(math.fsum(logprobs), abs=0.02)
            assert found["mean"][row, column] == pytest.approx(math.fsum(logprobs) / len(logprobs), abs=2e-3)
    assert (found["sum"].argmax(1) != 1).all()  # the long name loses where its length counts
    assert not np.allclose(found["mean"], found["class_tokens_mean"])
    assert not np.allclose(found["mean"][0], found["mean"][1], atol=1e-6)  # the picture matters


def test_scores_do_not_depend_on_company(llm: Any) -> None:
    together = gptscores(llm, PICTURES, NAMES)
    for column, name in enumerate(NAMES):
        np.testing.assert_allclose(gptscores(llm, PICTURES[1:], [name])[0, 0], together[1, column], atol=1e-4)
