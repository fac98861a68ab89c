"""LatteCLIP's table: its ten data sets with its settings, our figures beside the published ones, on one GPU.

    python -m domains.paper eurosat --images EuroSAT/2750 --split EuroSAT/split_zhou_EuroSAT.json    # once for each
    python -m benchmarks.paper [--sets eurosat dtd] [--data data] [--vllm .venv-gpu/bin/python]

Each data set is `latteflow run data/NAME/domain.yaml`: its report is in `runs/NAME`, and what was killed goes on when
this is started again. Where vLLM still has texts to write, the stages up to there are run one by one, those of texts by
the Python that has vLLM (docs/describers.md, *Two environments*), so that one program at a time has the GPU. A data set
that fails leaves the others alone.

Nothing is downloaded unless HF_HUB_OFFLINE=0 is set. The exit code is 0 if all that was asked for is in the table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ruamel.yaml import YAML

from latteflow.domains.paper import NAMES, domain_file
from latteflow.flows.pipeline import repaired
from latteflow.flows.plan import plan
from latteflow.models.errors import ModelError
from latteflow.models.settings import VllmSettings
from latteflow.storage.errors import DataError, StorageError
from latteflow.tasks.core.domain import ConfigError, Domain

PUBLISHED = {"zero_shot": 4.74, "flyp": 3.45}
"""Points by which LatteCLIP is better than zero-shot, and than "other state-of-the-art unsupervised methods", for which
FLYP stands here: means over the ten, from the abstract (arXiv 2410.08211). No figure of one data set is known to us."""
OPENCLIP = {
    "caltech101": 91.05, "dtd": 55.69, "eurosat": 48.06, "fgvc_aircraft": 24.53, "flowers102": 70.24, "food101": 82.69,
    "oxford_pets": 90.76, "stanford_cars": 86.07, "sun397": 68.72,
}  # fmt: skip
"""Zero-shot of the same weights as OpenCLIP publishes it (docs/openclip_results.csv), to notice wrong weights or data.
With ensembles of templates, other splits and sometimes means per class: a few points of difference say nothing."""
TRAINED = ("flyp", "latteclip")
TEXTS = ("describe", "group")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--sets", nargs="+", choices=NAMES, default=NAMES, metavar="NAME")
    options.add_argument("--data", type=Path, default=Path("data"), help="folder that domains.paper wrote to")
    options.add_argument("--vllm", type=Path, default=Path(".venv-gpu/bin/python"), help="the Python that has vLLM")
    chosen = options.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        sys.exit(table(chosen.sets, chosen.data, chosen.vllm))
    except (ConfigError, DataError, ModelError, StorageError) as error:
        sys.exit(f"error: {error}")


def table(names: Sequence[str], data: Path, vllm: Path) -> str | None:
    """Make and print it. Returns in one line what is not in it and why, if there is anything."""
    files = {name: data / name / "domain.yaml" for name in names}
    domains = {name: Domain.load(file) for name, file in files.items() if file.is_file()}
    writes = {name: needs_texts(domain) for name, domain in domains.items()}
    absent = [name for name in names if name not in domains]
    problems = [f"data sets in {data}/ (python -m domains.paper): {', '.join(absent)}"] if absent else []
    lacks = [each for name in domains for each in lacking(domains[name], vllm, writes[name])]
    if not domains:
        lacks = list(lacking(preset(absent[0]), vllm, writes=True))
    if lacks or not domains:
        return f"error: not on this machine: {'; '.join(dict.fromkeys([*problems, *lacks]))}"
    done = [name for name in domains if all(map(succeeds, commands(files[name], vllm, writes[name])))]
    if failed := [name for name in domains if name not in done]:
        problems.append(f"see above why these failed: {', '.join(failed)}")
    if done:
        folders = {name: Path(domains[name].output) / domains[name].name for name in done}
        found = {name: json.loads((folder / "metrics.json").read_text()) for name, folder in folders.items()}
        sys.stdout.write(f"{markdown(found)}\n")
    return f"error: not in the table: {'; '.join(problems)}" if problems else None


def preset(name: str) -> Domain:
    """Of a data set that is not there; two classes stand for its own."""
    return Domain.model_validate({**YAML(typ="safe").load(domain_file(name)), "classes": ["a", "b"]})


def needs_texts(domain: Domain) -> bool:
    """Whether a run would ask vLLM for some."""
    stages = repaired(plan, domain) if isinstance(domain.describer, VllmSettings) else []
    return any(each.reasons for each in stages if each.label in TEXTS)


def lacking(domain: Domain, vllm: Path, writes: bool) -> Iterator[str]:
    """What a run needs and has not; ``writes``: vLLM has texts to write."""
    import open_clip
    from huggingface_hub import snapshot_download

    own, writer = domain.clip, domain.describer
    if domain.evaluation is None or not {*TRAINED} <= {*domain.method}:
        yield f"`evaluation` and `method: [{', '.join(TRAINED)}]` in the domain file of {domain.name}"
    try:
        open_clip.download_pretrained(open_clip.get_pretrained_cfg(own.model, own.pretrained or ""))
    except OSError:
        yield f"weights of {own.model} {own.pretrained}"
    if not writes or not isinstance(writer, VllmSettings):
        return
    try:
        if not Path(writer.model).is_dir():
            snapshot_download(writer.model, revision=writer.revision)
    except OSError:
        yield f"weights of {writer.model}"
    if not vllm.is_file():
        yield f"an environment with vLLM (docs/describers.md): {vllm}"


def commands(file: Path, vllm: Path, writes: bool) -> Iterator[list[str]]:
    """What makes a data set's figures, one after the other; ``writes`` as above."""
    run = ["-m", "latteflow.flows.cli", "run", str(file)]
    for stage in ("shard", "embed", *TEXTS) if writes else ():
        yield [str(vllm) if stage in TEXTS else sys.executable, *run, "--only", stage]
    yield [sys.executable, *run]


def succeeds(command: list[str]) -> bool:
    """Run it. What it says goes to standard error, which leaves standard output to the table."""
    sys.stderr.write(f"{' '.join(command)}\n")
    return subprocess.run(command, stdout=sys.stderr).returncode == 0


def markdown(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Of each data set's `metrics.json` a row, their means, and what is published."""
    lines = [
        "| data set | test images | OpenCLIP's zero-shot | zero-shot | FLYP | LatteCLIP | over zero-shot | over FLYP |",
        "| --- " * 8 + "|",
    ]
    rows = []
    for name, metrics in found.items():
        scores = {**metrics["methods"], "zero_shot": metrics["zero_shot"]["methods"]["zero_shot_plain"]}
        top1 = {method: 100 * np.array(scores[method]["seeds"]) for method in ("zero_shot", *TRAINED)}
        gains = [float(top1["latteclip"].mean() - top1[other].mean()) for other in PUBLISHED]
        rows.append([*(float(each.mean()) for each in top1.values()), *gains])
        shown = [spread(each) for each in top1.values()]
        cells = [name, str(metrics["n_test"]), str(OPENCLIP.get(name, "")), *shown, *(f"{gain:+.1f}" for gain in gains)]
        lines.append(f"| {' | '.join(cells)} |")
    *top1s, over_zero_shot, over_flyp = np.mean(rows, axis=0)
    ours = [*(f"{each:.1f}" for each in top1s), f"{over_zero_shot:+.2f}", f"{over_flyp:+.2f}"]
    lines.append(f"| mean of these {len(rows)} | | | {' | '.join(ours)} |")
    published = f"{PUBLISHED['zero_shot']:+} | {PUBLISHED['flyp']:+} over others"
    lines.append(f"| LatteCLIP's paper, mean of {len(NAMES)} | | | | | | {published} |")
    return "\n".join(lines)


def spread(top1: np.ndarray) -> str:
    """Mean and standard deviation over seeds."""
    return f"{top1.mean():.1f}" + (f" ± {top1.std(ddof=1):.1f}" if len(top1) > 1 else "")


if __name__ == "__main__":
    main()
