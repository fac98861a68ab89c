"""How much of the engine's speed the stages describe and pair keep: against a bare ``LLM.chat`` over the same prompts.

Makes shards and features here, then measures in the environment of ``make test-vllm``, whose engine runs on CPU with a
tiny model of random weights: the engine is as fast as it gets, and all else shows. The two ways take turns in one
process, with the engine's caches emptied before each. Then describing against a server of the same engine.

    python -m benchmarks.describe [FOLDER] [--images 600] [--rounds 4]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from latteflow.tasks.core.domain import Domain

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))
CONTEXT, BATCH, TOKENS = 512, 64, 32
WORDS = "red blue small large round wooden metal plate chair table lamp window dog cat boat under near with dark"
BEFORE_PAIR = ("shard", "embed", "describe", "group", "screen")
LEAST = {"stage / bare": 0.9, "pair stage / bare pairs": 0.9, "server / stage": 0.8, "server / requests": 0.9}
"""What is aimed at. A server needs processor time of its own, which a machine of two cores does not have to spare: what
such a machine can give is in ``requests``, the same bodies made before and posted by bare threads."""
AS_USERS_DO = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
"""vLLM's default: the engine's core in a process of its own. Tests have it in theirs, as it starts sooner."""


def prepare(images: Path, count: int, folder: Path) -> Path:
    """A domain of so many pictures, sharded and embedded by a tiny CLIP."""
    from conftest import make_tiny_clip
    from latteflow.flows.pipeline import run_plainly
    from latteflow.tasks.core.domain import Domain

    found = sorted(path for path in images.rglob("*") if path.suffix in (".png", ".jpg", ".jpeg", ".webp"))
    if len(found) < count:
        raise SystemExit(f"{images} has {len(found)} images, {count} are needed; `make demo` makes them")
    (folder / "train").mkdir()
    for path in found[:count]:
        shutil.copy(path, folder / "train")
    make_tiny_clip(folder / "clip")
    engine = (
        f"kind: vllm, model: {folder / 'tiny'}, dtype: float32, max_context: {CONTEXT}, max_batch: {BATCH}, "
        "extra: {enforce_eager: true}"
    )
    domain = write_domain(folder, "in_process", engine, count)
    for stage in ("shard", "embed"):
        run_plainly(Domain.load(domain), only=stage)
    for stage in BEFORE_PAIR[2:]:
        run_plainly(Domain.load(folder / "pairs.yaml"), only=stage)
    return domain


def write_domain(folder: Path, file: str, engine: str, count: int) -> Path:
    """A domain file, and ``pairs.yaml`` beside it, where the engine writes about pairs from texts that are there."""
    path = folder / f"{file}.yaml"
    shared = (
        f"name: bench\nsource: train\nclasses: [one, two, three]\nclip: {{model: ./clip, resize: pad}}\n"
        f"shard: {{images: {max(count // 4, 1)}}}\nstore: store\n"
    )
    path.write_text(f"{shared}describer: {{{engine}, max_tokens: {TOKENS}, prompts: caltech101}}\n")
    draw = random.Random(0)
    rows = [
        f"train/{each.name},a {' '.join(draw.choices(WORDS.split(), k=8))}"
        for each in sorted((folder / "train").iterdir())
    ]
    (folder / "texts.csv").write_text("\n".join(["path,text", *rows]) + "\n")
    (folder / "pairs.yaml").write_text(
        f"{shared}describer: {{kind: sidecar, texts: texts.csv}}\nmethod: pc_clip\n"
        f"pairs: {{budget: {count}, describer: {{{engine}, max_tokens: {TOKENS}}}}}\n"
    )
    return path


def describe_anew(file: Path) -> float:
    """Images per second of the stage, everything counted."""
    from latteflow.flows.pipeline import as_they_are
    from latteflow.tasks.core.domain import Domain
    from latteflow.tasks.core.stage import rules
    from latteflow.tasks.describe.describe import describe

    domain = Domain.load(file)
    shards, embedded = as_they_are(domain, "shard", "embed")
    begin = time.perf_counter()
    with rules(refresh=["describe"]):
        describe(domain, shards, embedded)
    return shards.counts["images"] / (time.perf_counter() - begin)


def pair_anew(file: Path) -> float:
    """Texts about pairs per second of the stage, everything counted. Noise is never usable, so the stage ends with an
    error after its first part, which is all of them, and from which the next time would go on."""
    from latteflow.flows.pipeline import as_they_are
    from latteflow.storage.errors import DataError
    from latteflow.tasks.core.domain import Domain
    from latteflow.tasks.core.stage import rules
    from latteflow.tasks.describe.pair import pair

    domain = Domain.load(file)
    shards, embedded, *_, screened = as_they_are(domain, *BEFORE_PAIR)
    shutil.rmtree(Path(domain.store) / domain.name / "pair", ignore_errors=True)
    begin = time.perf_counter()
    with rules(refresh=["pair"]), contextlib.suppress(DataError):
        pair(domain, shards, embedded, screened)
    return domain.pairs.budget / (time.perf_counter() - begin)


def pair_questions(domain: Domain) -> list[str]:
    """What the stage asks, in words."""
    from latteflow.flows.pipeline import as_they_are
    from latteflow.tasks.core.stage import open_store
    from latteflow.tasks.describe.pair import _questions, described
    from latteflow.tasks.describe.texts import Gallery

    made = [open_store(domain).open(each.ref) for each in as_they_are(domain, *BEFORE_PAIR)]
    images, features, *_, screened = made
    gallery = Gallery(domain.of_pairs(), images, features)
    return [each.prompt for each, _ in _questions(domain, images, gallery.labels, described(screened))]


def bare_requests(file: Path) -> float:
    """Requests per second of a client that does nothing else."""
    import http.client
    from concurrent.futures import ThreadPoolExecutor
    from threading import local
    from urllib.parse import urlsplit

    from latteflow.flows.pipeline import as_they_are
    from latteflow.models.texts import prompts
    from latteflow.models.texts.describers.openai import _data_url
    from latteflow.storage.images import open_image
    from latteflow.storage.shards import read_index, read_records
    from latteflow.tasks.core.domain import Domain
    from latteflow.tasks.core.stage import open_store

    domain = Domain.load(file)
    (shards,) = as_they_are(domain, "shard")
    artifact = open_store(domain).open(shards.ref)
    (question,) = prompts.load("caltech101").image
    bodies = []
    for record in read_records(artifact, read_index(artifact)):
        image = {"type": "image_url", "image_url": {"url": _data_url(open_image(record.data).convert("RGB"))}}
        message = {"role": "user", "content": [image, {"type": "text", "text": question}]}
        asked = {"model": "tiny", "messages": [message], "max_tokens": TOKENS, "temperature": 0}
        bodies.append(json.dumps(asked).encode())
    mine = local()

    def post(body: bytes) -> None:
        if not hasattr(mine, "connection"):
            mine.connection = http.client.HTTPConnection(urlsplit(domain.describer.url).netloc, timeout=120)
        mine.connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        json.loads(mine.connection.getresponse().read())["choices"]

    begin = time.perf_counter()
    with ThreadPoolExecutor(2 * BATCH) as pool:
        list(pool.map(post, bodies))
    return len(bodies) / (time.perf_counter() - begin)


def measure(file: Path, rounds: int) -> None:
    """In the environment with vLLM: both ways by turns; prints one line of JSON."""
    from vllm import SamplingParams

    from latteflow.flows.pipeline import as_they_are
    from latteflow.models.texts import prompts
    from latteflow.models.texts.describers.vllm import open_vllm
    from latteflow.storage.images import open_image
    from latteflow.storage.shards import read_index, read_records
    from latteflow.tasks.core.domain import Domain
    from latteflow.tasks.core.stage import open_store

    domain = Domain.load(file)
    (shards,) = as_they_are(domain, "shard")
    llm = open_vllm(domain.describer)._llm
    artifact = open_store(domain).open(shards.ref)
    pictures = [open_image(record.data).convert("RGB") for record in read_records(artifact, read_index(artifact))]
    (question,) = prompts.load("caltech101").image

    def bare() -> float:
        ask = {"type": "text", "text": question}
        asked = [
            [{"role": "user", "content": [{"type": "image_pil", "image_pil": picture}, ask]}] for picture in pictures
        ]
        begin = time.perf_counter()
        llm.chat(asked, SamplingParams(max_tokens=TOKENS, temperature=0, seed=0), use_tqdm=False)
        return len(pictures) / (time.perf_counter() - begin)

    def bare_pairs() -> float:
        asked = [[{"role": "user", "content": each}] for each in questions]
        begin = time.perf_counter()
        llm.chat(asked, SamplingParams(max_tokens=TOKENS, temperature=0, seed=0), use_tqdm=False)
        return len(questions) / (time.perf_counter() - begin)

    pairs = file.with_name("pairs.yaml")
    questions = pair_questions(Domain.load(pairs))
    ways = {
        "bare": bare,
        "stage": lambda: describe_anew(file),
        "bare pairs": bare_pairs,
        "pair stage": lambda: pair_anew(pairs),
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, run in ways.items():
            llm.reset_mm_cache()
            llm.reset_prefix_cache()
            speed = run()
            if number:  # the first round warms up
                speeds[name].append(speed)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    sys.stdout.write(json.dumps({"speeds": speeds, "peak_mb": peak}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "data/demo/train")
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.measure:
        measure(chosen.measure, chosen.rounds)
        return
    from engines.tiny_vlm import ON_CPU, free_port, serve, vllm_python

    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        subprocess.run([vllm_python(), ROOT / "tests/engines/tiny_vlm.py", folder / "tiny"], check=True)
        domain = prepare(chosen.folder, chosen.images, folder)
        done = subprocess.run(
            [vllm_python(), "-m", "benchmarks.describe", "--measure", domain, "--rounds", str(chosen.rounds)],
            check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, **ON_CPU, **AS_USERS_DO},
        )  # fmt: skip
        found = json.loads(done.stdout.splitlines()[-1])
        speeds = found["speeds"]
        with serve(folder / "tiny", port := free_port(), BATCH):
            engine = f"kind: openai, model: tiny, url: http://127.0.0.1:{port}/v1, concurrency: {2 * BATCH}"
            through = write_domain(folder, "server", engine, chosen.images)
            speeds |= {"requests": [], "server": []}
            for number in range(chosen.rounds + 1):
                for name, run in (("requests", bare_requests), ("server", describe_anew)):
                    speed = run(through)
                    if number:
                        speeds[name].append(speed)
    middle = {name: statistics.median(each) for name, each in speeds.items()}
    lines = [f"{name:16} {middle[name]:7.1f} /s  ({min(s):.1f} - {max(s):.1f})" for name, s in speeds.items()]
    for ratio, least in LEAST.items():
        above, below = ratio.split(" / ")
        lines.append(f"{ratio:16} {middle[above] / middle[below]:7.2f}  (aim: {least})")
    lines.append(f"peak memory      {found['peak_mb']:7.0f} MB in process")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
