"""A service whose nights pass quickly: Prefect on Postgres, a worker, SeaweedFS, a domain, a clock that is set."""

from __future__ import annotations

import contextlib
import csv
import os
import subprocess
import sys
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import yaml
from engines.tiny_vlm import ROOT
from faults.seaweed import BUCKET, KEYS, Seaweed
from PIL import Image
from prefect.client.schemas.objects import FlowRun
from service.clock import HERE, Clock
from service.harness import Service, kill, until
from service.postgres import Postgres

from latteflow.domains.fashion import demo
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.stage import open_store

BERLIN = ZoneInfo("Europe/Berlin")
FIRST, MORE, TESTED = 300, 12, 450
"""Images of the first night, of each night that follows, and to judge the champions by."""
KEPT_DAYS = 7
"""Of the server's records."""
WORN = {"t-shirt": "body", "trousers": "legs", "sandal": "feet", "sneaker": "feet", "ankle boot": "feet"}


class Nightly:
    """The service, its domain, and what people do to both."""

    def __init__(self, folder: Path, first: date) -> None:
        self.folder, self.day = folder, first - timedelta(days=1)
        self.clock, self.seaweed = Clock(folder), Seaweed(folder / "s3")
        self.pictures = [each for each in demo(folder) if each.split == "train"]
        self.tests = [each for each in demo(folder) if each.split == "test"][:TESTED]
        self.classes = {each.label: each.label for each in self.tests if each.label != "ankle boot"}
        """As the data set calls them, and as the domain does now."""
        self.settings: dict[str, Any] = {
            "name": "clothes", "source": "train", "clip": {"model": "embedded", "resize": "pad"},
            "templates": ["a photo of a {}."], "evaluation": {"source": "test", "labels": "labels.csv"},
            "method": "transduction", "shard": {"images": 100}, "store": f"s3://{BUCKET}/nights", "output": "disk/runs",
        }  # fmt: skip
        self.texts: dict[str, str] = {}
        self.seen_texts: set[str] = set()

    def __enter__(self) -> Nightly:
        self._ends = contextlib.ExitStack()
        try:
            self._begin()
        except BaseException:
            self._ends.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.close()

    def _begin(self) -> None:
        self.clock.set(datetime(self.day.year, self.day.month, self.day.day, 20, tzinfo=BERLIN))
        self._ends.callback(self.seaweed.stop)
        self.seaweed.start()
        self.seaweed.make_bucket()
        os.environ.update(self._keys())
        self.postgres = Postgres(self.folder / "postgres")
        self._ends.callback(self.postgres.close)
        until(self.postgres.is_up, "Postgres", 60)
        self.postgres.create()
        self._small_disk()
        self.file = self.folder / "clothes.yaml"
        self.add(FIRST)
        self.write()
        self.service = Service(self.folder, **self._environment())
        self._ends.callback(self.service.close)
        self.service.prefect("work-pool", "create", "cpu", "--type", "process", "--overwrite")
        self.service.prefect("--no-prompt", "deploy", "--all", "--prefect-file", str(self._deployments()))
        self.service.prefect("automation", "create", "--from-file", "deploy/automations.yaml")
        self.worker = self.service.worker("cpu")

    def _keys(self) -> dict[str, str]:
        key, secret, _ = KEYS["dev"]
        url = f"http://127.0.0.1:{self.seaweed.port}"
        return {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret, "AWS_ENDPOINT_URL": url}

    def _environment(self) -> dict[str, str]:
        retention = timedelta(days=KEPT_DAYS).total_seconds()
        return {
            **self.clock.environment, **self._keys(), "PYTHONPATH": f"{HERE / 'moved'}:{ROOT}",
            "TMPDIR": str(self.disk), "PREFECT_SERVER_DATABASE_CONNECTION_URL": self.postgres.url,
            "PREFECT_SERVER_SERVICES_DB_VACUUM_RETENTION_PERIOD": f"{retention:.0f}",
            "PREFECT_WORKER_QUERY_SECONDS": "10",  # as ever
            # Machines that run tests are slow.
            "PREFECT_SERVER_DATABASE_TIMEOUT": "90", "PREFECT_SERVER_DATABASE_CONNECTION_TIMEOUT": "90",
        }  # fmt: skip

    def _deployments(self) -> Path:
        """The two that have schedules, switched on, and about our domain."""
        said = yaml.safe_load((ROOT / "prefect.yaml").read_text())
        said["deployments"] = [each for each in said["deployments"] if "schedules" in each]
        for deployment in said["deployments"]:
            for schedule in deployment["schedules"]:
                schedule |= {"active": True, "parameters": {**schedule["parameters"], "domain": str(self.file)}}
        file = self.folder / "prefect.yaml"
        file.write_text(yaml.safe_dump(said))
        return file

    def _small_disk(self) -> None:
        """Where the worker keeps its temporary files and its pages: 64 MB, if we may mount that."""
        self.disk = self.folder / "disk"
        self.disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(self.disk)]
        self.mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
        if self.mounted:
            self._ends.callback(subprocess.run, ["umount", "--lazy", str(self.disk)], check=True)

    @property
    def domain(self) -> Domain:
        return Domain.load(self.file)

    def add(self, count: int) -> None:
        """Images come; of classes that the domain does not know there are none."""
        folder = self.folder / "train"
        folder.mkdir(exist_ok=True)
        known = [each for each in self.pictures if each.label in self.classes]
        for each in known[:count]:
            self.pictures.remove(each)
            (folder / f"{each.name}.png").write_bytes(each.png)
            self.texts[f"{each.name}.png"] = (
                f"a small grey photo of something worn on the {WORN.get(each.label, 'body')}"
            )

    def put(self, name: str, data: bytes | Image.Image, text: str) -> None:
        """Another file comes."""
        file = self.folder / "train" / name
        data.save(file) if isinstance(data, Image.Image) else file.write_bytes(data)
        self.texts[name] = text

    def write(self) -> None:
        """The domain file, the labels and the texts as they are now."""
        (self.folder / "test").mkdir(exist_ok=True)
        labelled = [each for each in self.tests if each.label in self.classes]
        for each in labelled:
            (self.folder / each.path).write_bytes(each.png)
        labels = [("path", "class"), *((each.path, self.classes[each.label]) for each in labelled)]
        texts = [("path", "text"), *((f"train/{path}", text) for path, text in self.texts.items())]
        for name, rows in (("labels.csv", labels), ("texts.csv", texts)):
            with (self.folder / name).open("w", newline="") as file:
                csv.writer(file).writerows(rows)
        self.file.write_text(yaml.safe_dump({**self.settings, "classes": list(self.classes.values())}))

    def due(self, flow: str) -> FlowRun | None:
        """The run of a flow on the day that it is, by its schedule; None if there is none."""
        found = [run for run in self.service.runs(flow) if _day(run) == self.day]
        assert len(found) <= 1, f"{len(found)} runs of {flow} on {self.day}"
        return found[0] if found else None

    def ended(self, run: FlowRun) -> FlowRun:
        """The run, when it has come to its end."""

        def final() -> FlowRun | None:
            if self.worker.poll() is not None:  # a worker ends by itself if it does not find the server for minutes
                self.worker = self.service.worker("cpu")
            found = self.service.client.read_flow_run(run.id)
            return found if found.state and found.state.is_final() else None

        found: FlowRun = until(final, f"the end of {run.name}", 600, every_s=1.0)
        return found

    def kill_worker(self) -> None:
        """And what it runs; another is started in its place."""
        kill(self.worker)
        self.worker = self.service.worker("cpu")

    def at_work(self) -> None:
        """Returns when a stage of the domain is being made."""
        objects = open_store(self.domain).objects
        working = lambda: any(key.endswith("/running.json") for key in objects.listing("clothes"))  # noqa: E731
        until(working, "a stage to be made", every_s=0.5)

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """A `latteflow` command, at the service's time."""
        return subprocess.run(
            [sys.executable, "-m", "latteflow.flows.cli", *words], env=self.service.environment, cwd=self.folder,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600,
        )  # fmt: skip


def _day(run: FlowRun) -> date:
    return run.expected_start_time.astimezone(BERLIN).date()
