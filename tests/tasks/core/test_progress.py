"""Every stage says how far it is, as often as whoever watches wants to hear."""

import logging
from collections import defaultdict

import pytest

from latteflow.flows.pipeline import run_plainly
from latteflow.tasks.core import progress
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.progress import Log, Step, tell, told_as, watch


class Ear:
    def __init__(self, every_s: float = 0.0) -> None:
        self.every_s, self.heard, self.ended = every_s, list[Step](), 0

    def show(self, step: Step) -> None:
        self.heard.append(step)

    def end(self) -> None:
        self.ended += 1


@pytest.fixture
def ear(monkeypatch: pytest.MonkeyPatch) -> Ear:
    ear = Ear()
    watch(ear)
    yield ear  # type: ignore[misc]
    watch(Log())


def test_stages_tell_of_all_that_they_make(ear: Ear, domain: Domain) -> None:
    made = run_plainly(domain)
    last = defaultdict(set)
    for step in ear.heard:
        assert 0 <= step.done <= step.total
        last[step.label].add((step.done, step.total, step.unit))
    stages = {"look at train", "shard train", "shard test", "embed train", "embed test", "describe", "select"}
    assert {*stages, "tune latteclip.seed-1"} <= last.keys()
    assert (24, 24, "files") in last["look at train"] and (24, 24, "images") in last["shard train"]
    assert (24, 24, "images") in last["embed train"] and (24, 24, "texts") in last["describe"]
    assert ear.ended >= len(made)
    ear.heard.clear()
    run_plainly(domain)
    assert not {step.label for step in ear.heard} & {"shard train", "embed train", "describe", "select"}


def test_time_left_is_that_of_what_was_done_here(ear: Ear, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 10.0, 20.0, 30.0])
    monkeypatch.setattr("latteflow.tasks.core.progress.time.monotonic", lambda: next(clock))
    with told_as("embed train"):
        for done in (80, 85, 95):
            tell(done, 100, "images")
    assert [step.left_s for step in ear.heard] == [None, 30.0, pytest.approx(20 / 3)]
    assert str(ear.heard[1]) == "embed train 85 of 100 images, about 30.0 s left"


def test_a_log_has_a_line_a_minute(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    seconds = [0.0]
    monkeypatch.setattr("latteflow.tasks.core.progress.time.monotonic", lambda: seconds[0])
    caplog.set_level(logging.INFO)
    watch(progress.Log())
    with told_as("describe"):
        for number in range(181):
            seconds[0] = float(number)
            tell(number, 181, "texts")
    assert [line.split(" of ")[0] for line in caplog.messages] == ["describe 60", "describe 120", "describe 180"]
