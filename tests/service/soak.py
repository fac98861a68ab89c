"""Nights of a service: what happens in each, and what must hold after it.

Real is all but the time between two nights. `make soak` has thirty of them, and prints the table of docs/operations.md:

    PYTHONPATH=tests python -m service.soak [FOLDER]

tests/service/test_nights.py has the five that tell the most.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from pathlib import Path

from PIL import Image
from prefect.client.schemas.objects import FlowRun
from service.harness import kill, until
from service.nightly import BERLIN, KEPT_DAYS, MORE, Nightly

from conftest import draw
from latteflow.storage.captions import CaptionStore
from latteflow.storage.errors import DataError
from latteflow.storage.shards import read_index
from latteflow.storage.tables import read_parquet
from latteflow.tasks.core.stage import open_store
from latteflow.tasks.report.history import History
from latteflow.tasks.ship.nights import nights
from latteflow.tasks.ship.promote import champion
from latteflow.tasks.tune.select import Views

SUMMER = date(2027, 3, 28)
"""At two o'clock it is three, and half past two, when nights are due, is no time of that night."""
GOOD = ("Promoted", "Kept", "Unchanged")
SLACK = 1.0
"""Points by which a champion should at most be worse on clean images than the best before it."""


@dataclass(frozen=True)
class Event:
    """What happens to the service or its images, and how the night may end."""

    before: Callable[[Nightly], object] = lambda service: None
    during: Callable[[Nightly, FlowRun], object] = lambda service, run: None
    off: timedelta = timedelta()
    """The server is off, until so long after the night was due."""
    new: int = MORE
    """Images that come."""
    ends: tuple[str, ...] = GOOD


def _noise(service: Nightly) -> None:
    for number in range(30):
        pixels = random.Random(number).randbytes(28 * 28 * 3)
        service.put(f"noise{number:02d}.png", Image.frombytes("RGB", (28, 28), pixels), "noise")


def _foreign(service: Nightly) -> None:
    for number in range(30):
        service.put(f"foreign{number:02d}.png", draw(number, ("red", "green", "blue")[number % 3]), "a coloured shape")


def _broken(service: Nightly) -> None:
    """Cut off, empty, a page, and one that says it has 10^10 pixels."""
    whole = service.pictures[0].png
    huge = whole[:16] + (100_000).to_bytes(4, "big") * 2 + whole[24:]
    for number in range(20):
        data = (whole[: 100 + number], b"", b"<html>%d</html>" % number, huge + bytes([number]))[number % 4]
        service.put(f"broken{number:02d}.png", data, "nothing")


def _add_class(service: Nightly) -> None:
    service.classes["ankle boot"] = "ankle boot"
    service.pictures.sort(key=lambda each: each.label != "ankle boot")
    later = service.pictures[40:]
    random.Random(0).shuffle(later)
    service.pictures[40:] = later


def _change_describer(service: Nightly) -> None:
    service.settings["describer"] = {"kind": "sidecar", "texts": "texts.csv"}


def _remove_noise(service: Nightly) -> None:
    for each in (service.folder / "train").glob("noise*.png"):
        each.unlink()


def _restart(service: Nightly, run: FlowRun) -> None:
    service.at_work()
    kill(service.service.server)
    service.service.serve()


def _kill_worker(service: Nightly, run: FlowRun) -> None:
    service.at_work()
    service.kill_worker()


def _fill(service: Nightly) -> None:
    if not service.mounted:
        sys.stderr.write("only root may mount a small disk; it is not filled\n")
        return
    room = os.statvfs(service.disk)
    (service.disk / "fill").write_bytes(bytes(max(room.f_bavail * room.f_frsize - 4096, 0)))


def _make_room(service: Nightly, run: FlowRun) -> None:
    service.ended(run)
    (service.disk / "fill").unlink(missing_ok=True)


EVENTS = {
    "": Event(),
    "quiet": Event(new=0),
    "30 images of noise": Event(_noise),
    "30 foreign images": Event(_foreign),
    "20 broken files": Event(_broken),
    "noise removed": Event(_remove_noise, new=0),
    "a class added": Event(_add_class, new=40),
    "a class renamed": Event(lambda service: service.classes.update(handbag="bag")),
    "describer changed": Event(_change_describer),
    "server killed": Event(during=_restart, ends=(*GOOD, "Crashed", "Failed")),
    "server off when due": Event(off=timedelta(hours=1)),
    "server off all night": Event(off=timedelta(hours=7), ends=("Skipped",)),
    "worker killed": Event(during=_kill_worker, ends=("Crashed",)),
    "disk full": Event(_fill, _make_room, ends=(*GOOD, "Failed", "Crashed")),
    "summer time": Event(),
}  # fmt: skip
SHORT = ("", "30 images of noise", "worker killed", "summer time", "disk full")
LONG = (
    "", "", "30 images of noise", "quiet", "server off when due", "worker killed", "", "20 broken files",
    "a class added", "server killed", "disk full", "summer time", "noise removed", "a class renamed",
    "30 foreign images", "describer changed", "server off all night", "", "quiet", "", "", "worker killed", "", "quiet",
    "", "disk full", "", "", "quiet", "",
)  # fmt: skip


@dataclass
class Row:
    """A night, as it is told."""

    day: date
    event: str
    state: str = ""
    due: str = ""
    seconds: float = 0.0
    new: int = 0
    images: int = 0
    quarantined: int = 0
    served: int = 0
    right: float = 0.0
    """Of the champion, percent of the clean images."""
    classes: int = 0
    store_mb: float = 0.0
    objects: int = 0
    runs: int = 0
    database_mb: float = 0.0
    wrong: str = ""

    HEAD = (
        "| night | what happened | due | state | s | new | images | set aside | champion | right, % "
        "| store MB | objects | runs on record | database MB |"
    )

    def __str__(self) -> str:
        cells = (
            f"{self.day:%m-%d}", self.event, self.due, self.state, f"{self.seconds:.0f}", self.new, self.images,
            self.quarantined, self.served, f"{self.right:.1f}", f"{self.store_mb:.1f}", self.objects, self.runs,
            f"{self.database_mb:.1f}",
        )  # fmt: skip
        return f"| {' | '.join(map(str, cells))} |{f'  <- {self.wrong}' if self.wrong else ''}"


def soak(folder: Path, events: Sequence[str]) -> Iterator[Row]:
    """Have these nights, and tell of each; the night of summer time is that of its date."""
    place = events.index("summer time") if "summer time" in events else 0
    first = SUMMER - timedelta(days=place)
    with Nightly(folder, first) as service:
        rows: list[Row] = []
        for number, name in enumerate(events):
            service.day = first + timedelta(days=number)
            row = Row(service.day, name)
            try:
                _have_night(service, row, first=number == 0)
                _tidied(service)
                _measure(service, row)
            except Exception as error:  # whatever it was, the next night comes
                row.wrong = f"{type(error).__name__}: {error}"
            rows.append(row)
            row.wrong = "; ".join(filter(None, [row.wrong, *_wrong(service, rows)]))
            yield row


def _have_night(service: Nightly, row: Row, first: bool) -> None:
    event = EVENTS[row.event]
    event.before(service)
    service.add(0 if first else event.new)
    service.write()
    run = until(lambda: service.due("retune"), f"a night of {service.day}", 300, every_s=1.0)
    due = run.expected_start_time
    row.due = f"{due.astimezone(BERLIN):%H:%M %Z}"
    if event.off:
        kill(service.service.server)
        service.clock.set(due + event.off)
        service.service.serve()
    else:
        service.clock.set(due - timedelta(seconds=3))
    event.during(service, run)
    state = service.ended(run).state
    assert state is not None
    row.state = state.name
    assert row.state in event.ends, f"{row.state}: {state.message}"


def _tidied(service: Nightly) -> None:
    """`tidy` is due on Sundays."""
    run = service.due("tidy")
    if run is not None:
        service.clock.set(run.expected_start_time - timedelta(seconds=3))
        state = service.ended(run).state
        assert state is not None and state.name == "Completed", f"tidy ended as {state}"
        assert "under way" not in (state.message or ""), f"tidy left all as it was: {state.message}"
    service.clock.set(datetime(service.day.year, service.day.month, service.day.day, 20, tzinfo=BERLIN))


def _measure(service: Nightly, row: Row) -> None:
    store = open_store(service.domain)
    stored = store.objects.listing("")
    row.objects, row.store_mb = len(stored), sum(each.bytes for each in stored.values()) / 1e6
    row.runs = int(service.postgres.ask("SELECT count(*) FROM flow_run WHERE end_time IS NOT NULL"))
    row.database_mb = int(service.postgres.ask("SELECT pg_database_size('prefect')")) / 1e6
    row.classes = len(service.classes)
    told = [each for each in nights(store, "clothes") if each.at[:10] == f"{row.day}"]
    if told:
        night = told[-1]
        row.seconds, row.new, row.images, row.quarantined = night.seconds, night.new, night.images, night.quarantined
    with suppress(DataError):
        served = champion(service.domain)
        row.served, row.right = served.version, _right(service)


def _right(service: Nightly) -> float:
    """Percent of the clean images about which the champion is right."""
    domain, history = service.domain, History(open_store(service.domain), "clothes")
    served, split = champion(domain), [history.newest(stage, "test") for stage in ("shard", "embed")]
    images, features = (each.artifact for each in split if each)
    views = Views(domain, images, features)
    paths = dict(read_index(images).select("key", "path").iter_rows())
    order = list(service.classes)
    truth = {each.path.removeprefix("test/"): order.index(each.label) for each in service.tests if each.label in order}
    guessed = views.logits(open_store(domain).open(served.tuned), served.method, served.seed).argmax(1)
    right = [
        int(guess) == truth[paths[key].removeprefix("test/")] for key, guess in zip(views.keys, guessed, strict=True)
    ]
    return 100 * sum(right) / len(right)


def _wrong(service: Nightly, rows: Sequence[Row]) -> list[str]:
    """What should hold after a night and does not."""
    row, found = rows[-1], []
    if row.state in GOOD and (lost := _lost(service)):
        found.append(f"not in the store: {', '.join(sorted(lost)[:3])}")
    if gone := service.seen_texts - (now := _texts(service)):
        found.append(f"{len(gone)} texts are gone")
    service.seen_texts |= now
    limit = service.clock.time() - (KEPT_DAYS + 2) * 86400
    old = f"SELECT count(*) FROM flow_run WHERE end_time < to_timestamp({limit:.0f})"
    if int(left := service.postgres.ask(old)):
        found.append(f"{left} runs are on record for longer than {KEPT_DAYS + 2} days")
    return found


def behind(rows: Sequence[Row]) -> float:
    """Points by which a champion was at worst behind the best before it with as many classes, on clean images.

    Nobody sees that without labels: `make soak` asks for at most :data:`SLACK`, a test of five nights cannot.
    """
    found, best = 0.0, dict[int, float]()
    for row in rows:
        best[row.classes] = max(best.get(row.classes, 0.0), row.right)
        found = max(found, best[row.classes] - row.right)
    return found


def _lost(service: Nightly) -> set[str]:
    """Files of the source that are neither images of the newest run nor set aside with a reason."""
    found = History(open_store(service.domain), "clothes").newest("shard", "train")
    assert found is not None
    tables = [read_parquet(found.artifact.read(name)) for name in found.artifact.names(".quarantine.parquet")]
    known = set(read_index(found.artifact)["path"]).union(*(set(table["path"]) for table in tables))
    return {each.name for each in (service.folder / "train").iterdir()} - {Path(each).name for each in known}


def _texts(service: Nightly) -> set[str]:
    captions = CaptionStore(open_store(service.domain).objects)
    return {key for who in captions.describers() for key in captions.sample(who, 10**6)["caption_key"]}


def main() -> int:
    folder = Path(sys.argv[1]) if sys.argv[1:] else Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)  # Postgres has a user of its own
    begin, rows = time.monotonic(), []
    sys.stdout.write(f"{Row.HEAD}\n{'| --- ' * (Row.HEAD.count('|') - 1)}|\n")
    for row in soak(folder, LONG):
        rows.append(row)
        sys.stdout.write(f"{row}\n")
        sys.stdout.flush()
    wrong = sum(bool(row.wrong) for row in rows)
    minutes = (time.monotonic() - begin) / 60
    sys.stdout.write(
        f"{len(rows)} nights in {minutes:.0f} minutes, {wrong} not as they should be; "
        f"the champion at worst {behind(rows):.1f} points behind the best before it, where {SLACK:.0f} is asked for\n"
    )
    return int(wrong > 0 or behind(rows) > SLACK)


if __name__ == "__main__":
    sys.exit(main())
