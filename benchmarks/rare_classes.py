"""Top-1 of every method of the last run on the classes that the descriptions speak of, and on those they hardly do.

    python -m benchmarks.rare_classes domains/demo.yaml

Classes are sorted by the number of training descriptions with their name and halved, as CLAMP's paper does with the
captions that its models were trained on. Means over classes, so that large ones count no more.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from latteflow.models.methods.clamp.concepts import concept_counts
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.stage import open_store
from latteflow.tasks.describe.screen import read_screened, usable
from latteflow.tasks.report.history import History


def main(path: str) -> None:
    """Print a table."""
    domain = Domain.load(path)
    run = History(open_store(domain), domain.name).newest_run()
    texts = usable(read_screened(run["screen"], "images"))["text"].to_list()
    counts = concept_counts(texts, domain.prompt_names, least=1)
    order = sorted(range(len(counts)), key=lambda number: -counts[number])
    half = (len(order) + 1) // 2
    parts = {"all": order, "frequent": order[:half], "rare": order[half:]}
    metrics = json.loads((Path(domain.output) / domain.name / "metrics.json").read_text())
    scores = {**metrics["zero_shot"]["methods"], **metrics["methods"]}
    for name, part in parts.items():
        said = sum(counts[number] for number in part) / len(part)
        sys.stdout.write(f"{name}: {len(part)} classes, named by {said:.1f} of {len(texts)} texts on average\n")
    for method, score in scores.items():
        found = {number: score["per_class"].get(str(number)) for number in order}
        means = [
            100 * sum(each["top1"] for each in known) / len(known)
            for part in parts.values()
            if (known := [found[number] for number in part if found[number]])
        ]
        sys.stdout.write(f"{method:20}" + "".join(f"{mean:8.1f}" for mean in means) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
