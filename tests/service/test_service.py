"""What the user types every day, with a real server and real workers: deployments, pools, dead workers, schedules."""

import json
from pathlib import Path

import pytest
from engines.tiny_vlm import ON_CPU, ROOT
from service.harness import Service, kill, until

from chatserver import Ask, ChatServer, Reply, answer
from conftest import draw_folder
from latteflow.flows.pipeline import run_plainly
from latteflow.storage.captions import CaptionStore
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.stage import open_store

pytestmark = pytest.mark.slow
COUNT = 96


def write_domain(folder: Path, tiny_clip: Path, describer: str, store: str, more: str = "") -> Path:
    path = folder / f"{store}.yaml"
    path.write_text(
        f"name: shapes\nsource: train\nclasses: [red, green, blue]\nclip: {{model: {tiny_clip}, resize: pad}}\n"
        f"describer: {{{describer}}}\nshard: {{images: 12}}\nseeds: [0]\nlatteclip: {{epochs: 2, batch_size: 8}}\n"
        f"store: {store}\noutput: runs-{store}\n{more}"
    )
    return path


def digests(domain: Domain) -> dict[str, str]:
    """Content of the newest artifacts, but that of the report, which tells times."""
    store = open_store(domain)
    stages = ("shard", "embed", "describe", "group", "screen", "tune", "select", "evaluate")
    return {f"{stage} {each.fingerprint}": each.ref.digest for stage in stages for each in store.all("shapes", stage)}


def texts(domain: Domain) -> list[str]:
    """Keys in the caption store, those that are there twice twice."""
    captions = CaptionStore(open_store(domain).objects)
    return [key for who in captions.describers() for key in captions.sample(who, 10**6)["caption_key"]]


def test_a_new_domain_on_two_pools_outlives_its_gpu_worker(
    service: Service, tmp_path: Path, tiny_clip: Path, tiny_vlm: Path, vllm_python: str
) -> None:
    draw_folder(tmp_path / "train", COUNT)
    describer = (
        f"kind: vllm, model: {tiny_vlm}, dtype: float32, max_context: 512, max_batch: 2, max_tokens: 16, "
        "extra: {enforce_eager: true}"
    )
    file = write_domain(tmp_path, tiny_clip, describer, "pooled", "workers: {texts: 120, runs: 2}\n")
    domain = Domain.load(file)
    worker = service.worker("gpu", vllm_python, **ON_CPU)
    service.prefect("deployment", "run", "adapt/adapt", "--param", f"domain={file}")
    captions = Path(domain.store) / "captions"
    until(lambda: len(list(captions.glob("*/*.parquet"))) >= 1, "the first texts", every_s=0.01)
    kill(worker)
    assert 0 < len(texts(domain)) < 2 * COUNT
    worker = service.worker("gpu", vllm_python, **ON_CPU)
    run = service.ended("adapt")
    assert run.state and run.state.is_completed(), service.logs(run)
    kill(worker)
    crashed = service.runs("describe", "Crashed")
    assert len(crashed) == 1 and "No beat for 90 s" in str(crashed[0].state and crashed[0].state.message)
    assert run.name == "adapt-shapes" and crashed[0].name.startswith("describe-shapes-0-")

    # No text was asked for twice, and everything is as the plain function makes it of the same texts.
    assert len(texts(domain)) == len(set(texts(domain))) >= 2 * COUNT
    plain = Domain.load(write_domain(tmp_path, tiny_clip, describer, "plain"))
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "captions").symlink_to(captions)
    run_plainly(plain)
    assert digests(plain) == digests(domain)
    every = sorted(service.client.read_artifacts(), key=lambda each: each.updated)
    rows = {each.key: each for each in every if each.key}
    assert rows["shapes-texts"].data == 100.0
    assert "tune" in str(rows["shapes-stages"].data) and "/report/data/report." in str(rows["shapes-report"].data)


def test_features_by_a_pool_whose_runs_die_twice(service: Service, tmp_path: Path, tiny_clip: Path) -> None:
    draw_folder(tmp_path / "train", 48)
    more = "workers: {images: 30, attempts: 3}\n"
    file = write_domain(tmp_path, tiny_clip, "kind: tags", "embedded", more)
    switch = tmp_path / "stage"
    switch.write_text("embed")
    path = f"{Path(__file__).parent / 'killer'}:{ROOT}"
    worker = service.worker("train", PYTHONPATH=path, KILL_IN=str(switch))
    service.prefect("deployment", "run", "adapt/adapt", "--param", f"domain={file}")
    until(lambda: service.runs("embed", "Crashed"), "the first death")
    switch.write_text("embed")
    run = service.ended("adapt")
    kill(worker)
    assert run.state and run.state.is_completed(), service.logs(run)
    assert switch.read_text() == "" and len(service.runs("embed", "Crashed")) == 2
    done = service.runs("embed", "Completed")
    assert {each.name for each in done} == {"embed-shapes-0-2", "embed-shapes-2-4"}
    plain = Domain.load(write_domain(tmp_path, tiny_clip, "kind: tags", "alone"))
    run_plainly(plain)
    assert digests(plain) == digests(Domain.load(file))
    rows = {each.key: each.data for each in service.client.read_artifacts()}
    assert rows["shapes-images"] == 100.0


def test_pairs_and_training_have_pools_of_their_own(
    service: Service, tmp_path: Path, tiny_clip: Path, vllm_python: str, chat: ChatServer
) -> None:
    def say(ask: Ask) -> Reply:
        told = [part.split('"')[0] for part in ask.prompt.split('description of "')[1:]]
        if told:
            return answer(f"The first image has {told[0]} in its middle, while the second image has {told[1]} there.")
        return answer(f"a shape that is number {len(chat.asked)} of all")

    chat.script = say
    draw_folder(tmp_path / "train", 24)
    file = write_domain(
        tmp_path, tiny_clip, f"kind: openai, url: {chat.url!r}, model: tiny", "compared",
        "method: [pc_clip]\npc_clip: {batch_size: 16, epochs: 2}\npairs: {budget: 40}\nworkers: {train: true}\n",
    )  # fmt: skip
    workers = [service.worker("gpu", vllm_python), service.worker("train")]
    service.prefect("deployment", "run", "adapt/adapt", "--param", f"domain={file}")
    run = service.ended("adapt")
    assert run.state and run.state.is_completed(), service.logs(run)
    for flow in ("pair", "tune"):
        (given,) = service.runs(flow)
        assert given.name == f"{flow}-shapes" and given.state and given.state.is_completed()
    asked = len(chat.asked)
    assert all(each.cached for each in run_plainly(Domain.load(file))) and len(chat.asked) == asked
    for worker in workers:
        kill(worker)


def test_a_schedule_that_is_switched_on_becomes_a_run(service: Service, tmp_path: Path) -> None:
    assert not service.runs("retune")
    file = tmp_path / "prefect.yaml"
    file.write_text((ROOT / "prefect.yaml").read_text().replace("active: false", "active: true"))
    service.prefect("--no-prompt", "deploy", "--name", "retune", "--prefect-file", str(file))
    found = until(lambda: service.runs("retune", "Scheduled"), "a scheduled run", 60)
    assert found[0].parameters == {"domain": "domains/demo.yaml"}
    assert found[0].expected_start_time.tzinfo is not None


def test_mistakes_are_told_before_a_run_begins(service: Service) -> None:
    for given, told in [
        ({"name": "Bad", "source": "x", "classes": ["a", "b"]}, "domain.name"),
        ({"name": "ok", "source": "x", "classes": ["a", "b"], "latteclp": {}}, "latteclp"),
        (7, "7 is not of type 'object', 'string'"),
    ]:
        said = service.prefect("deployment", "run", "adapt/adapt", "--param", f"domain={json.dumps(given)}", fails=True)
        assert told in said


def test_a_file_with_mistakes_fails_with_their_lines(service: Service, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("name: bad\nsource: train\nclasses: [a, b]\nepochs: 3\n")
    service.prefect("deployment", "run", "evaluate/evaluate", "--param", f"domain={tmp_path / 'bad.yaml'}")
    run = service.ended("evaluate")
    assert run.state and run.state.is_failed()
    said = f"{run.state.message}\n{service.logs(run)}"
    assert "line 4: `epochs` unknown key" in said and "Traceback" not in said
