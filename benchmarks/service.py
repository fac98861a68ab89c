"""What Prefect costs: the same shards through the flow, with ranges given to a pool, and by the plain function.

    python -m benchmarks.service 250 500 1000 2000 20x1000

Shards of one tiny image each, or 20 shards of 1,000; texts from a file, a model of random weights: stages that take
next to nothing, so that what is seen is orchestration and storage. Ranges are written by runs in the same process; that
a worker takes each from its pool is left out, as that only adds waiting. Every measurement is a process of its own; CPU
seconds and requests are its own, so let PREFECT_API_URL name a server: one that has to be started counts as well.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from latteflow.tasks.core.domain import Domain

TEXTS_IN_A_RUN = 200
STORES = {"plain": "plain", "adapt": "adapt", "flow": "flow", "again": "flow", "night": "flow"}
"""Ways to run, and the store of each. adapt: everything in one process. flow: ranges given away."""


def prepare(folder: Path, shards: int, images: int) -> Path:
    """Images, texts and a domain file."""
    from PIL import Image

    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from conftest import make_tiny_clip

    make_tiny_clip(folder / "clip")
    (folder / "images").mkdir()
    rows = []
    for number in range(shards * images):
        image = Image.new("RGB", (16, 16), (number % 256, number // 256, 90 * (number % 3)))
        image.save(folder / "images" / f"{number:06d}.png")
        rows.append(f"images/{number:06d}.png,picture number {number} of a shape\n")
    (folder / "texts.csv").write_text("path,text\n" + "".join(rows))
    (folder / "domain.yaml").write_text(
        "name: many\nsource: images\nclasses: [red, green, blue]\nclip: {model: ./clip, centre: true}\n"
        "describer: {kind: sidecar, texts: texts.csv}\nmethod: transduction\n"
        f"shard: {{images: {images}}}\n"
    )
    return folder / "domain.yaml"


def measure(how: str, domain: Domain) -> dict[str, float]:
    """One run, in this process: seconds, CPU seconds, HTTP requests, and the most memory it ever had in MB."""
    calls = _count_requests()
    begin = time.perf_counter()
    if how == "plain":
        from latteflow.flows.pipeline import run_plainly

        run_plainly(domain)
    else:
        _write_here()
        if how == "night":
            from latteflow.flows.retune import retune

            retune(domain)
        else:
            from latteflow.flows.adapt import adapt

            adapt(domain)
    seconds = time.perf_counter() - begin
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu, peak = used.ru_utime + used.ru_stime, used.ru_maxrss / 1024
    return {"seconds": seconds, "cpu": cpu, "requests": calls["http"], "peak_mb": peak}


def _count_requests() -> dict[str, int]:
    import httpx

    calls = {"http": 0}
    plain, plain_async = httpx.Client.send, httpx.AsyncClient.send

    def send(self: Any, *args: Any, **named: Any) -> Any:
        calls["http"] += 1
        return plain(self, *args, **named)

    async def send_async(self: Any, *args: Any, **named: Any) -> Any:
        calls["http"] += 1
        return await plain_async(self, *args, **named)

    httpx.Client.send, httpx.AsyncClient.send = send, send_async  # type: ignore[method-assign]
    return calls


def _write_here() -> None:
    """Runs on the pool are made in this process."""
    from latteflow.flows import fanout
    from latteflow.flows.describe import describe

    def start(name: str, *, parameters: dict[str, Any], **_: Any) -> Any:
        state: Any = describe(**parameters, return_state=True)
        return SimpleNamespace(id=state.state_details.flow_run_id)

    fanout.run_deployment = start  # type: ignore[assignment]
    fanout._LOOK_S = (0.2, 1.0)  # type: ignore[misc]


def main(sizes: list[str]) -> None:
    say = sys.stdout.write
    say("shards  images  how      seconds  CPU s  requests  peak MB\n")
    for size in sizes:
        shards, images = (int(each) for each in (size if "x" in size else f"{size}x1").split("x"))
        with tempfile.TemporaryDirectory() as folder:
            file = prepare(Path(folder), shards, images)
            for how in STORES:
                done = subprocess.run(
                    [sys.executable, "-m", "benchmarks.service", "--one", how, str(file)],
                    check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, "PREFECT_LOGGING_LEVEL": "ERROR"},
                )  # fmt: skip
                found = json.loads(done.stdout.splitlines()[-1])
                say(f"{shards:6}  {shards * images:6}  {how:6}  {found['seconds']:8.1f}")
                say(f"  {found['cpu']:5.1f}  {found['requests']:8}  {found['peak_mb']:7.0f}\n")
                sys.stdout.flush()


def one(how: str, file: Path) -> None:
    domain = Domain.load(file)
    update: dict[str, Any] = {"store": str(file.parent / STORES[how]), "output": str(file.parent / "runs")}
    if how == "flow":
        update["workers"] = {"texts": TEXTS_IN_A_RUN}
    domain = Domain.model_validate({**domain.model_dump(exclude_unset=True), **update})
    sys.stdout.write(json.dumps(measure(how, domain)) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2], Path(sys.argv[3]))
    else:
        main(sys.argv[1:] or ["250", "500", "1000", "2000", "20x1000"])
