"""How long photographs take from a folder to features, shard and embed together, beside another revision of this code.

    python -m benchmarks.embed --against REVISION [--large 200] [--small 1000] [--rounds 3]

Photos of 1732 x 1155 and of 320 x 240, made on the spot; a ViT-S/32 with random weights. The two take turns, each
in a process of its own that has imported everything and loaded the model before the clock starts. Processor time is
that of all processes, the same on a busy machine; what the model takes of it is said, as no decoder can save that.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SIZES = {"large": (1732, 1155), "small": (320, 240)}


def main() -> None:
    """Print a line for each size."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--against", help="a revision of git")
    options.add_argument("--large", type=int, default=200)
    options.add_argument("--small", type=int, default=1000)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.measure:
        sys.stdout.write(json.dumps(measured(chosen.measure)) + "\n")
        return
    with tempfile.TemporaryDirectory() as scratch:
        compare(Path(scratch), chosen.against, {"large": chosen.large, "small": chosen.small}, chosen.rounds)


def compare(scratch: Path, against: str | None, counts: dict[str, int], rounds: int) -> None:
    """Both revisions by turns; one line for each size that has images."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    from benchmarks.predict import photos

    torch.manual_seed(0)
    config = {"model_cfg": open_clip.get_model_config("ViT-S-32"), "preprocess_cfg": {}}
    (scratch / "clip").mkdir(exist_ok=True)
    (scratch / "clip" / "open_clip_config.json").write_text(json.dumps(config))
    save_file(open_clip.create_model("ViT-S-32").state_dict(), scratch / "clip" / "open_clip_model.safetensors")
    codes = {"ours": ROOT}
    if against is not None:
        codes[against] = scratch / "against"
        codes[against].mkdir()
        archive = subprocess.run(["git", "archive", against], check=True, stdout=subprocess.PIPE, cwd=ROOT)
        subprocess.run(["tar", "x"], check=True, input=archive.stdout, cwd=codes[against])
    for name, size in SIZES.items():
        if not counts[name]:
            continue
        photos(scratch / name, counts[name], size)
        file = scratch / f"{name}.yaml"
        file.write_text(
            f"name: {name}\nsource: {name}\nclasses: [one, two]\nclip: {{model: ./clip}}\nstore: store-{name}\n"
        )
        found: dict[str, list[dict[str, float]]] = {code: [] for code in codes}
        for _ in range(rounds):
            for code, root in codes.items():
                found[code].append(alone(file, root))
        sys.stdout.write(f"{name}: {counts[name]} photos of {size[0]} x {size[1]}\n")
        for code, runs in found.items():
            middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            sys.stdout.write(
                f"  {code:8} {middle['seconds']:6.1f} s, processor {middle['processor']:6.1f} s, "
                f"of which the model {middle['model']:6.1f} s\n"
            )
        if against is not None:
            ratios = [
                [old[key] / new[key] for old, new in zip(found[against], found["ours"], strict=True)]
                for key in ("seconds", "processor")
            ]
            shown = [f"{statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f})" for each in ratios]
            sys.stdout.write(f"  {shown[0]} times as fast, {shown[1]} by processor time\n")


def alone(file: Path, root: Path) -> dict[str, float]:
    """Shard and embed a domain anew with the code of a folder."""
    # This file as it is, with the code of the other revision.
    command = [sys.executable, str(Path(__file__).resolve()), "--measure", str(file)]
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=root, env=environment)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(file: Path) -> dict[str, float]:
    """Seconds on the wall, of processor time in all, and of that in the model."""
    import resource
    import shutil
    import time

    from latteflow.models.towers import clip
    from latteflow.tasks.core.domain import Domain
    from latteflow.tasks.ingest.embed import embed
    from latteflow.tasks.ingest.shard import shard

    domain = Domain.load(file)
    shutil.rmtree(domain.store, ignore_errors=True)
    model = clip.load(domain.clip)
    encode, within = model.model.encode_image, [0.0]

    def timed(pixels, **how):  # type: ignore[no-untyped-def]
        begin = time.thread_time()
        try:
            return encode(pixels, **how)
        finally:
            within[0] += time.thread_time() - begin

    model.model.encode_image = timed  # type: ignore[assignment]

    def used() -> float:
        found = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(each.ru_utime + each.ru_stime for each in found)

    begin, before = time.perf_counter(), used()
    embed(domain, shard(domain, "train"))
    return {"seconds": time.perf_counter() - begin, "processor": used() - before, "model": within[0]}


if __name__ == "__main__":
    main()
