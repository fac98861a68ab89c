"""GPTScore on a domain: a multimodal model classifies some of its test images by the likelihood of each class name.

    python -m benchmarks.gptscore domains/demo.yaml --model MODEL --images 200

Runs in the environment that vLLM lives in, after `latteflow run` has sharded the images. Prints top-1 for each way to
divide by the length.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import sys
from typing import get_args

import numpy as np
from PIL import Image

from models.describers.vllm import open_vllm
from models.gptscore import Normalise, gptscores
from models.images import to_rgb
from models.settings import VllmSettings
from storage.shards import read_index, read_records
from tasks.domain import Domain
from tasks.history import History
from tasks.labels import read_truth
from tasks.stage import open_store


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
