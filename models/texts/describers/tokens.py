"""How long prompts are, by the model's own processor: most of it are images, which each family cuts in its own way."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from latteflow.models.settings import LanguageModelSettings

log = logging.getLogger("latteflow.models")
Shown = tuple[str, Sequence[tuple[int, int]]]
"""A question, and width and height in pixels of each image that is shown with it."""


def prompt_tokens(settings: LanguageModelSettings, prompts: Sequence[Shown]) -> float | None:
    """Mean length of prompts in tokens; None where the model's processor is not on this machine or does not say.

    Nothing is downloaded, and no weights are read.
    """
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(
            settings.model,
            revision=settings.revision,
            local_files_only=True,
            trust_remote_code=getattr(settings, "trust_remote_code", False),
            **settings.extra.get("mm_processor_kwargs", {}),
        )
        lengths = [_length(processor, question, sizes) for question, sizes in prompts]
    except Exception as error:  # each family has errors of its own, and an estimate is no reason to fail
        log.info("the processor of %s does not say how long prompts are: %s", settings.model, error)
        return None
    return sum(lengths) / len(lengths) if lengths else None


def _length(processor: Any, question: str, sizes: Sequence[tuple[int, int]]) -> int:
    """Each of several images as if alone, as in vLLM: LLaVA-OneVision's processor cuts only a lone one into tiles."""
    from PIL import Image

    if len(sizes) > 1:
        without = _length(processor, question, [])
        return without + sum(_length(processor, question, [size]) - without for size in sizes)
    images = [{"type": "image", "image": Image.new("RGB", size)} for size in sizes]
    message = {"role": "user", "content": [*images, {"type": "text", "text": question}]}
    found = processor.apply_chat_template(
        [message], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    return int(found["input_ids"].shape[-1])


def shown_size(size: tuple[int, int], longest_px: int) -> tuple[int, int]:
    """Of an image when no side of it may be longer."""
    scale = min(1.0, longest_px / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
