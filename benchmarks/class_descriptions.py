"""What a language model says classes look like, for zero-shot with descriptions (arXiv 2209.03320, 2210.07183).

The embedded language model is a small base model, which follows examples better than instructions.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from latteflow.models.methods.clamp import ClampSettings
from latteflow.models.methods.clamp.lm import load

ASPECTS = {
    "What it looks like": ("a tall animal with a very long neck and brown spots", "a thin blade with a wooden handle"),
    "Its shape and parts": ("a long neck, four thin legs and two small horns", "a pointed blade, a handle and a guard"),
    "Its colours": ("yellow fur with brown patches", "grey metal and brown wood"),
}
EXAMPLES = ("giraffe", "knife")
MAX_TOKENS = 24


def class_descriptions(names: Sequence[str]) -> list[list[str]]:
    """For each class one line for each aspect; likeliest words first, so that it is the same every time."""
    lm, tokenizer = _language_model()
    return [[_line(lm, tokenizer, aspect, name) for aspect in ASPECTS] for name in names]


@functools.cache
def _language_model() -> tuple[Any, Any]:
    return load(ClampSettings(lm="embedded"))


def _line(lm: Any, tokenizer: Any, aspect: str, name: str) -> str:
    shown = [f"{aspect}, {example}: {answer}.\n" for example, answer in zip(EXAMPLES, ASPECTS[aspect], strict=True)]
    prompt = tokenizer("".join(shown) + f"{aspect}, {name}:", return_tensors="pt")
    with torch.inference_mode():
        answer = lm.generate(**prompt, max_new_tokens=MAX_TOKENS, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    return str(tokenizer.decode(answer, skip_special_tokens=True)).strip().partition("\n")[0].strip()
