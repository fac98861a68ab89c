"""describe and group on a worker with the real engine, in process and behind ``vllm serve``, killed and gone on with.

Runs in the training environment, which makes shards and features and has no vLLM; the worker is another process in
another environment, over the same store.
"""

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import polars as pl
import pytest
from engines.tiny_vlm import ON_CPU, ROOT, free_port, serve, vllm_python

from conftest import draw_folder
from latteflow.flows.pipeline import run_plainly
from latteflow.models.texts.describers import EngineStopped
from latteflow.storage.captions import CaptionStore
from latteflow.storage.tables import read_parquet
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.stage import open_store

COUNT = 144
pytestmark = pytest.mark.slow
if not (ROOT / ".venv-vllm/bin/python").exists():
    pytest.skip("needs `make .venv-vllm/.installed`", allow_module_level=True)


def write_domain(folder: Path, tiny_clip: Path, describer: str, store: str = "store") -> Path:
    path = folder / f"{store}.yaml"
    path.write_text(
        "name: shapes\nsource: train\nclasses: [red, green, blue]\n"
        f"clip: {{model: {tiny_clip}, resize: pad, centre: false}}\n"
        f"describer: {{{describer}}}\nshard: {{images: 24}}\nseeds: [0]\nlatteclip: {{epochs: 2, batch_size: 8}}\n"
        f"store: {store}\noutput: runs\n"
    )
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    draw_folder(tmp_path / "train", COUNT)
    return tmp_path


def worker(domain: Path, stage: str, **environment: str) -> subprocess.Popen[str]:
    command = [vllm_python(), "-m", "latteflow.flows.cli", "run", str(domain), "--only", stage]
    heard = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, env={**os.environ, **ON_CPU, **environment}, cwd=ROOT, **heard)


def finished(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said[-4000:]
    return said


def stored(domain: Path, kind: str) -> pl.DataFrame:
    """All rows of a kind, those that are there twice twice."""
    captions = CaptionStore(open_store(Domain.load(domain)).objects)
    frames = [captions.sample(who, 10**6) for who in captions.describers()]
    return pl.concat(frames).filter(pl.col("kind") == kind)


def described(domain: Path) -> pl.DataFrame:
    """What readers of the `describe` artifact get."""
    store = open_store(Domain.load(domain))
    (artifact,) = store.all("shapes", "describe")
    return pl.concat(read_parquet(artifact.read(name)) for name in artifact.names(".captions.parquet"))


def kill_when(captions: Path, process: subprocess.Popen[bytes]) -> None:
    wait_for(captions, 1, process)
    os.killpg(process.pid, signal.SIGKILL)


def wait_for(captions: Path, parts: int, process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> None:
    limit = time.monotonic() + 300
    while len(list(captions.glob("*/*.parquet"))) < parts:
        assert process.poll() is None and time.monotonic() < limit, process.communicate()[0][-4000:]
        time.sleep(0.005)


def test_a_worker_killed_half_way_is_gone_on_with(folder: Path, tiny_clip: Path, tiny_vlm: Path) -> None:
    engine = (
        f"kind: vllm, model: {tiny_vlm}, dtype: float32, max_context: 512, max_batch: 2, max_tokens: 16, "
        "extra: {enforce_eager: true}"
    )
    domain = write_domain(folder, tiny_clip, engine)
    run_plainly(Domain.load(domain), only="shard")
    run_plainly(Domain.load(domain), only="embed")
    captions = folder / "store" / "captions"

    # The engine dies: one clear error.
    process = worker(domain, "describe", VLLM_ENABLE_V1_MULTIPROCESSING="1")
    wait_for(captions, 1, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (core,) = [int(child) for child in children if "EngineCore" in Path(f"/proc/{child}/cmdline").read_text()]
    os.kill(core, signal.SIGKILL)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 1 and "error: vLLM with model" in said and "run again to go on" in said
    crashed = stored(domain, "image")
    assert 0 < crashed.height < COUNT

    # The whole worker dies: nothing is said, and nothing that was written is lost.
    process = worker(domain, "describe")
    wait_for(captions, len(list(captions.glob("*/*.parquet"))) + 1, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = stored(domain, "image")
    assert crashed.height < before.height < COUNT
    said = finished(worker(domain, "describe"))
    assert f"texts={COUNT}" in said
    rows = stored(domain, "image")
    assert rows.height == rows["caption_key"].n_unique() == COUNT  # nothing that was paid for was asked again
    kept = rows.join(before, on=["caption_key", "text"], how="semi", nulls_equal=True)
    assert kept.height == before.height
    assert rows["engine"].str.starts_with("vllm ").all() and (rows["prompt_tokens"] > 0).all()
    table = described(domain)
    assert table["member_keys"].list.first().n_unique() == table.height == COUNT

    # The same images at another time and place: the same bytes.
    again = write_domain(folder, tiny_clip, engine, store="again")
    for stage in ("shard", "embed"):
        run_plainly(Domain.load(again), only=stage)
    finished(worker(again, "describe"))
    digests = [{artifact.ref.digest for artifact in open_store(Domain.load(each)).all("shapes", "describe")}
               for each in (domain, again)]  # fmt: skip
    assert digests[0] == digests[1]

    finished(worker(domain, "group"))
    groups = stored(domain, "group")
    assert groups.height == groups["caption_key"].n_unique() == COUNT
    results = {each.label: each for each in run_plainly(Domain.load(domain))}  # the rest needs no engine
    assert results["describe"].cached and results["group"].cached and not results["tune"].cached


def test_a_server_killed_half_way_is_gone_on_with(folder: Path, tiny_clip: Path, tiny_vlm: Path) -> None:
    port = free_port()
    domain = write_domain(
        folder, tiny_clip,
        f"kind: openai, model: tiny, url: http://127.0.0.1:{port}/v1, max_tokens: 16, concurrency: 4, patience_s: 3",
    )  # fmt: skip
    for stage in ("shard", "embed"):
        run_plainly(Domain.load(domain), only=stage)
    with serve(tiny_vlm, port) as server:
        killer = threading.Thread(target=kill_when, args=(folder / "store" / "captions", server))
        killer.start()
        with pytest.raises(EngineStopped, match=r"gave no answer for 3 s.*run again when the server is back"):
            run_plainly(Domain.load(domain), only="describe")
        killer.join()
    before = stored(domain, "image").height
    assert 0 < before < COUNT
    with serve(tiny_vlm, port):
        run_plainly(Domain.load(domain), only="describe")
        run_plainly(Domain.load(domain), only="group")
    for kind in ("image", "group"):
        rows = stored(domain, kind)
        assert rows.height == rows["caption_key"].n_unique() == COUNT
        assert (rows["finish_reason"] != "error").all()
        assert rows["engine"].str.contains("version 0").all()
