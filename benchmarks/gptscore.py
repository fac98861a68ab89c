"""GPTScore on a domain: a multimodal model classifies some of its test images by the likelihood of each class name.

    python -m benchmarks.gptscore domains/demo.yaml --model MODEL --images 200

What CLAMP's paper compares with (6.3). One answer for each image and class goes through the model: for a few hundred
images. Runs in the environment that vLLM lives in, after `latteflow run` has sharded the images. Prints top-1 for each
way to divide by the length.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import sys
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

from latteflow.models.settings import VllmSettings
from latteflow.models.texts.describers.vllm import open_vllm
from latteflow.models.towers.images import to_rgb
from latteflow.storage.shards import read_index, read_records
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.stage import open_store
from latteflow.tasks.report.history import History
from latteflow.tasks.report.labels import read_truth

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
    images: Sequence[Image.Image],
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


def main() -> None:
    """Parse, draw, score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("domain")
    parser.add_argument("--model", required=True, help="name on the model hub, or a folder")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--extra", type=json.loads, default={}, help="further arguments of vllm.LLM, as JSON")
    options = parser.parse_args()
    domain = Domain.load(options.domain)
    store = open_store(domain)
    split = "test" if domain.evaluation and domain.evaluation.source else "train"
    newest = History(store, domain.name).newest("shard", split)
    if newest is None:
        sys.exit("no images were sharded yet; run `latteflow run` first")
    index = read_index(newest.artifact)
    truth = read_truth(domain, index["path"].to_list())
    rows = [int(row) for row in np.flatnonzero(truth >= 0)]
    drawn = sorted(random.Random(options.seed).sample(rows, min(options.images, len(rows))))
    records = read_records(newest.artifact, index[drawn])
    images = [to_rgb(Image.open(io.BytesIO(record.data))) for record in records]
    names = domain.prompt_names
    llm = open_vllm(VllmSettings(kind="vllm", model=options.model, extra=options.extra)).llm
    for normalise in get_args(Normalise):
        scores = gptscores(llm, images, names, normalise=normalise)
        right = (scores.argmax(1) == truth[drawn]).mean()
        sys.stdout.write(f"{normalise:20} top-1 {100 * right:.1f} of {len(images)} images\n")


if __name__ == "__main__":
    main()
