"""What the tests of this folder share: the tally, the process driver, and trees of a store to compare."""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults.seaweed import KEYS

from latteflow.storage.objects import ObjectStore


@dataclass
class Tally:
    """What was done to the product, and how much of it was shown to do no harm."""

    inflicted: Counter[str] = field(default_factory=Counter)
    survived: Counter[str] = field(default_factory=Counter)

    def lines(self) -> list[str]:
        """The table of docs/guarantees.md."""
        shown = [
            f"{self.survived[name]:6d} of {self.inflicted[name]:6d}  {words}"
            for name, words in WORDS.items()
            if self.inflicted[name]
        ]
        kinds = {kind: number for kind, number in sorted(self.inflicted.items()) if kind not in WORDS}
        if kinds:
            shown.append("of the network: " + ", ".join(f"{kind} {number}" for kind, number in kinds.items()))
        kills = sum(number for name, number in self.survived.items() if name.startswith("kill"))
        return [*shown, f"fault suite: {kills} kills and {self.survived['network']} network faults survived"]


TALLY = Tally()
WORDS = {
    "kill commit": "kills at commit points",
    "kill random": "kills at random moments",
    "kill s3": "kills of a process that writes to S3",
    "kill pipeline": "kills of the whole pipeline",
    "kill range": "kills of a worker of a range of shards",
    "kill compaction": "kills within a compaction of texts",
    "kill refresh": "kills while a stage is made anew",
    "kill server": "kills of the S3 server under a running stage",
    "network": "network faults",
    "workers": "workers side by side on one stage",
    "races": "races of many writers for one key",
    "full disk": "full disks",
    "clock": "wrong clocks",
    "mutants": "damaged and hostile images, archives and tables",
    "fuzzed": "inputs that a fuzzer made for our own parsers",
}


class Driver:
    """Speaks to `driver.py`."""

    def __init__(self, *words: str) -> None:
        here = Path(__file__).parent
        single = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(here / "driver.py"), *words],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, **single, "PYTHONPATH": str(here.parent.parent)},
        )  # fmt: skip
        threads = self._answer()["threads"]
        # Those of polars' allocator know how to fork; any other would be a lock waiting for its dead owner.
        assert sum(not name.startswith(("jemalloc", "polars-ooc")) for name in threads) == 1, threads

    def run(self, **command: Any) -> dict[str, Any]:
        """One command (see `driver.py`) and its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command, default=str) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def finish(self, **command: Any) -> None:
        """Run, and fail with the workers' own words unless all of them ended well."""
        answer = self.run(**command)
        assert not any(answer["statuses"]), (answer["statuses"], "\n".join(answer["stderr"]))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        return dict(json.loads(self._process.stdout.readline()))


@dataclass(frozen=True)
class Clean:
    """What an undisturbed run of a workload leaves."""

    tree: dict[str, bytes]
    commits: int
    """Objects it creates, replaces or deletes."""


def tree(store: ObjectStore) -> dict[str, bytes]:
    """Every object but those that are about a run: statistics, who runs it, the stat cache, a report with times."""
    about_a_run = ("/stat", "/running.json", "/report/")
    keys = (key for key in store.sizes("") if not any(part in key for part in about_a_run))
    return {key: store.read(key) for key in sorted(keys)}


def difference(found: dict[str, bytes], wanted: dict[str, bytes]) -> dict[str, str]:
    """How two trees differ, by key; short enough to be read in a failed test."""
    return {
        key: "missing" if key not in found else "not expected" if key not in wanted else "other bytes"
        for key in sorted(found.keys() | wanted.keys())
        if found.get(key) != wanted.get(key)
    }


def commits(journal: Path) -> Counter[str]:
    """How often each object was created, replaced or deleted by us."""
    return Counter(line for line in _lines(journal) if not line.startswith("part "))


def repeated_parts(journal: Path) -> int:
    """How many parts were made more often than once."""
    made = Counter(line for line in _lines(journal) if line.startswith("part "))
    return made.total() - len(made)


def environment(port: int) -> dict[str, str]:
    """How a process reaches a server or proxy on this machine, without any option in the domain file."""
    key, secret, _ = KEYS["dev"]
    return {
        "AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }  # fmt: skip


def _lines(journal: Path) -> list[str]:
    return journal.read_text().splitlines() if journal.exists() else []
