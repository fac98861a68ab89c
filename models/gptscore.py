"""GPTScore: a multimodal model classifies an image by how likely it finds "A photo of CLASS" (6.3).

What CLAMP's paper compares with. One answer for each image and class goes through the model: for a few hundred images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

Normalise = Literal["mean", "sum", "class_tokens_mean"]
"""mean: over the phrase's tokens, so that short names have no advantage. sum: the likelihood itself.
class_tokens_mean: over the class name's tokens alone."""


def score(logprobs: Sequence[float], normalise: Normalise = "mean", *, prefix: int = 0) -> float:
    """Length-normalised log-likelihood of a phrase.

    Args:
        logprobs: of each token of the phrase after those before it and the image.
        prefix: tokens of the phrase before the class name, for class_tokens_mean.

    Raises:
        ValueError: there is no token to score.
    """
    counted = logprobs[prefix:] if normalise == "class_tokens_mean" else logprobs
    if not counted:
        raise ValueError(f"a phrase of {len(logprobs)} tokens has none to score after the first {prefix}")
    return sum(counted) if normalise == "sum" else sum(counted) / len(counted)


def gptscores(
    llm: Any,
    images: Sequence[Image],
    names: Sequence[str],
    *,
    normalise: Normalise = "mean",
    question: str = "What is in the picture?",
    phrase: str = "A photo of {}",
) -> np.ndarray:
    """Scores of all classes for each image, by the log-probabilities of a phrase as the model's answer.

    The chat template stands around question and phrase as around any answer of the model; only the phrase's tokens are
    scored. A token that begins before the phrase, by a space, counts.

    Args:
        llm: of vLLM, for example `open_vllm(settings).llm`.
        names: of the classes, as they stand in the phrase.
        normalise: what is divided by.
        phrase: with one {} at its end for the name.

    Returns:
        `(images, classes)`, at most 0; the class is the largest.
    """
    from vllm import SamplingParams

    tokenizer = llm.get_tokenizer()
    # vLLM reads no cached prefix for log-probabilities of a prompt: it has none of what it did not compute.
    sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    found = np.zeros((len(images), len(names)))
    for row, image in enumerate(images):
        asked = {
            "role": "user",
            "content": [{"type": "image_pil", "image_pil": image}, {"type": "text", "text": question}],
        }
        answers = [phrase.replace("{}", name) for name in names]
        outputs = llm.chat(
            [[asked, {"role": "assistant", "content": answer}] for answer in answers],
            sampling,
            add_generation_prompt=False,
            continue_final_message=True,
            use_tqdm=False,
        )
        for column, (name, answer, output) in enumerate(zip(names, answers, outputs, strict=True)):
            ids = list(output.prompt_token_ids)
            n, of_name = (_tokens_of(text, ids, tokenizer) for text in (answer, name))
            logprobs = [output.prompt_logprobs[place][ids[place]].logprob for place in range(len(ids) - n, len(ids))]
            found[row, column] = score(logprobs, normalise, prefix=n - of_name)
    return found


def _tokens_of(text: str, ids: Sequence[int], tokenizer: Any) -> int:
    """How many tokens at the end hold a text: tokenizing it by itself may cut it elsewhere."""
    for n in range(1, len(ids) + 1):
        if text in tokenizer.decode(ids[-n:]):
            return n
    raise ValueError(f"the chat template changes the answer {text!r}, so that its tokens cannot be found")
