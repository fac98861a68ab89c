"""Flow runs that die in each stage, and runs that are cancelled: the next run goes on from the store."""

import sys
import threading
from pathlib import Path

import pytest
from engines.tiny_vlm import ROOT
from service.harness import Service, kill, until
from service.test_service import digests, write_domain

from chatserver import Ask, ChatServer, Reply, answer
from conftest import draw_folder
from latteflow.flows.pipeline import STAGES, run_plainly
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.stage import open_store

pytestmark = pytest.mark.slow


def test_killed_in_each_stage_and_tried_again(service: Service, tmp_path: Path, tiny_clip: Path) -> None:
    draw_folder(tmp_path / "train", 24)
    file, switch = write_domain(tmp_path, tiny_clip, "kind: tags", "killed"), tmp_path / "stage"
    path = f"{Path(__file__).parent / 'killer'}:{ROOT}"
    service.prefect("work-pool", "create", "mortal", "--type", "process")
    worker = service.worker("mortal", sys.executable, PYTHONPATH=path, KILL_IN=str(switch))
    runs = len(service.runs("adapt"))
    service.prefect(
        "--no-prompt", "deploy", "flows/adapt.py:adapt", "--name", "mortal", "--pool", "mortal", "--prefect-file",
        "prefect.yaml",
    )  # fmt: skip
    killed, spared = 0, set()
    stages = [stage for stage in STAGES if stage != "pair"]  # of methods that compare
    for stage in stages:
        if open_store(Domain.load(file)).all("shapes", stage):
            spared.add(stage)  # it ran beside the one that was killed last
            continue
        switch.write_text(stage)
        service.prefect("deployment", "run", "adapt/mortal", "--param", f"domain={file}")
        run = service.ended("adapt", runs + killed)
        assert run.state and run.state.is_crashed() and switch.read_text() == "", (stage, service.logs(run))
        killed += 1
    assert spared <= {"group", "evaluate"}  # beside describe, and beside select
    service.prefect("flow-run", "retry", str(run.id))
    until(lambda: service.client.read_flow_run(run.id).state.is_completed(), "the run that is tried again")
    kill(worker)
    domain = Domain.load(file)
    assert "Cached" in service.logs(run)
    plain = Domain.load(write_domain(tmp_path, tiny_clip, "kind: tags", "plain"))
    run_plainly(plain)
    assert digests(domain) == digests(plain)


def test_cancelling_a_run_reaches_the_workers(
    service: Service, tmp_path: Path, tiny_clip: Path, chat: ChatServer
) -> None:
    draw_folder(tmp_path / "train", 24)
    held = threading.Event()

    def hold(ask: Ask) -> Reply:
        if len(chat.asked) > 16:
            held.wait(300)
        return answer("a shape")

    chat.script = hold
    describer = f"kind: openai, url: {chat.url!r}, model: tiny, concurrency: 1"
    file = write_domain(tmp_path, tiny_clip, describer, "cancelled", "workers: {texts: 10}\n")
    worker = service.worker("gpu")
    service.prefect("deployment", "run", "adapt/adapt", "--param", f"domain={file}")
    until(lambda: len(chat.asked) > 16, "the workers to ask")
    run = service.runs("adapt", "Running")[-1]
    asked = len(service.runs("describe", "Running", "Late", "Scheduled", "Pending"))
    assert asked > 1
    service.prefect("flow-run", "cancel", str(run.id))
    until(lambda: not service.runs("describe", "Running", "Late", "Scheduled", "Pending", "Cancelling"), "the workers")
    assert len(service.runs("describe", "Cancelled")) >= asked
    until(lambda: service.client.read_flow_run(run.id).state.is_cancelled(), "the run")
    held.set()
    chat.script = lambda ask: answer("a shape")
    service.prefect("deployment", "run", "adapt/adapt", "--param", f"domain={file}")
    run = service.ended("adapt")
    assert run.state and run.state.is_completed(), service.logs(run)
    kill(worker)
