"""Untrusted input: nothing from outside is executed, leaves its folder, or stops a run."""

import contextlib
import io
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from faults import mutants
from faults.harness import Tally
from hypothesis import given, settings
from hypothesis import strategies as st

from latteflow.models.towers.images import to_rgb
from latteflow.storage.artifacts import Artifact, ArtifactStore
from latteflow.storage.errors import DataError
from latteflow.storage.images import ImageInfo, ImageLimits, ImageRejected, RejectReason, inspect, open_image
from latteflow.storage.inspectors import Inspectors
from latteflow.storage.listing import StatCache
from latteflow.storage.names import printable, raw
from latteflow.storage.objects import ObjectStore
from latteflow.storage.shards import Packing, read_index, read_quarantine, write_shards
from latteflow.storage.sources import Source
from latteflow.storage.tars import BLOCK, Member, TarBroken, members

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")
IMAGES, TARS, TABLES = 60, 120, 80
"""Mutants of each kind."""
FUZZED = {"tars": (250_000, 28), "names": (15_000, 10), "columns": (8_000, 16)}
"""Inputs for each parser, and the seconds after which it ends with fewer."""
LIMITS = ImageLimits(max_pixels=4_000_000, max_bytes=32 << 20)


@pytest.fixture
def survived(tally: Tally) -> Iterator[Counter[str]]:
    """Counts inputs, each when it was survived."""
    count: Counter[str] = Counter()
    yield count
    tally.inflicted.update(count)
    tally.survived.update(count)


def shard(source: Source, where: Path) -> Artifact:
    store = ArtifactStore(ObjectStore(str(where)))
    with StatCache(store.objects, "d/shard/stat").digested(source, LIMITS) as images:
        writer = store.writer("d", "shard", 1, {"split": "train"})
        return writer.finish(write_shards(writer, source, images, None, Packing(50, LIMITS)))


def test_mutated_images(survived: Counter[str]) -> None:
    draw = random.Random(1)
    seeds = list(mutants.images().values())
    found = [mutants.mutated(seed, draw, draw.choice(seeds)) for seed in seeds for _ in range(IMAGES)]
    with Inspectors(LIMITS, 2) as inspectors:
        verdicts = [verdict for start in range(0, len(found), 64) for verdict in inspectors(found[start : start + 64])]
    assert len(verdicts) == len(found)
    accepted = [data for data, verdict in zip(found, verdicts, strict=True) if isinstance(verdict, ImageInfo)]
    assert 0.1 < len(accepted) / len(found) < 0.9
    for data in accepted:
        with open_image(data) as image:
            to_rgb(image).resize((8, 8))  # what was accepted at an eighth of its size decodes whole
    reasons = Counter(verdict.reason for verdict in verdicts if isinstance(verdict, ImageRejected))
    assert reasons.keys() <= {
        RejectReason.CORRUPT,
        RejectReason.NOT_AN_IMAGE,
        RejectReason.TOO_LARGE,
        RejectReason.TOO_NARROW,
    }
    survived["mutants"] += len(found)


def test_a_jpeg_cut_anywhere_is_noticed() -> None:
    """Inspecting at an eighth of the size finds the same cuts as decoding all of it."""
    for name in ("jpeg", "jpeg progressive", "jpeg cmyk"):
        data = mutants.images()[name]
        for end in range(2, len(data), 7):
            with contextlib.suppress(Exception), open_image(data[:end]) as image:
                image.load()
                assert data[:end].endswith(b"\xff") or end > len(data) - 3, f"Pillow itself takes {name} cut at {end}"
                continue
            with pytest.raises(ImageRejected):
                inspect(data[:end], LIMITS)


@pytest.mark.parametrize("name", mutants.BOMBS)
def test_bombs_are_bounded(name: str, survived: Counter[str]) -> None:
    data = mutants.BOMBS[name]()
    assert len(data) < 8 << 20
    with Inspectors(ImageLimits(max_pixels=10_000_000), 1, seconds=3) as inspectors:
        inspectors([b"warm up"])
        begin = time.process_time(), time.perf_counter()
        (verdict,) = inspectors([data])
        assert time.process_time() - begin[0] < 1  # nothing is decoded in this process
        process = inspectors._idle.get()
        inspectors._idle.put(process)
        if process is None:
            assert isinstance(verdict, ImageRejected) and verdict.reason == RejectReason.DECODER_FAILED
            assert verdict.detail == "the decoder did not finish in 3 s of processor time"
        else:
            status = Path(f"/proc/{process.pid}/status").read_text()
            assert int(re.search(r"VmHWM:\s+(\d+)", status)[1]) < 200_000  # type: ignore[index]
    survived["mutants"] += 1


def test_only_the_image_that_breaks_the_decoder_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    good = mutants.images()["png"]
    program = (
        "import os, signal, latteflow.storage.inspectors as i\n"
        "plain = i.inspect\n"
        "def fragile(data, limits):\n"
        "    if data.endswith(b'CRASH'): os.kill(os.getpid(), signal.SIGSEGV)\n"
        "    while data.endswith(b'HANG'): pass\n"
        "    return plain(data, limits)\n"
        "i.inspect = fragile\n"
        "i.serve(lambda data, limits: (i.inspect(data, limits), b''))\n"
    )
    monkeypatch.setattr(Inspectors, "program", ["-c", program])
    with Inspectors(LIMITS, 1, seconds=0.3) as inspectors:
        verdicts = inspectors([good, good + b"CRASH", good, good + b"HANG", good])
        assert [isinstance(verdict, ImageInfo) for verdict in verdicts] == [True, False, True, False, True]
        assert [str(verdict) for verdict in verdicts if isinstance(verdict, ImageRejected)] == [
            "decoder_failed: the decoder ended with SIGSEGV",
            "decoder_failed: the decoder did not finish in 0.3 s of processor time",
        ]


def test_a_process_that_somebody_killed_costs_nothing() -> None:
    good = mutants.images()["png"]
    with Inspectors(LIMITS, 1) as inspectors:
        inspectors([good])
        process = inspectors._idle.get()
        assert process is not None
        inspectors._idle.put(process)
        os.kill(process.pid, signal.SIGKILL)
        assert inspectors([good]) == [ImageInfo("png", 24, 24)]


def test_inspecting_processes_may_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "import latteflow.storage.inspectors as i\n"
        f"def writing(data, limits):\n    open({str(tmp_path / 'written')!r}, 'wb').write(data)\n"
        "i.inspect = writing\n"
        "i.serve(lambda data, limits: (i.inspect(data, limits), b''))\n"
    )
    monkeypatch.setattr(Inspectors, "program", ["-c", program])
    with Inspectors(LIMITS, 1) as inspectors:
        (verdict,) = inspectors([b"data"])
    assert isinstance(verdict, ImageRejected)
    assert (tmp_path / "written").read_bytes() == b""


def test_mutated_tars(tmp_path: Path, survived: Counter[str]) -> None:
    draw = random.Random(2)
    seeds = list(mutants.tars().values())
    path = tmp_path / "mutant.tar"
    for seed in seeds:
        for _ in range(TARS):
            data = mutants.mutated(seed, draw, draw.choice(seeds))
            path.write_bytes(data)
            check(Source([str(path)]), len(data))
            survived["mutants"] += 1


def check(source: Source, size: int) -> None:
    """Every entry is a name that leads nowhere and a place inside the file."""
    entries = list(source.scan())
    assert len({entry.path for entry in entries}) == len(entries)
    for entry in entries:
        assert ".." not in entry.path.split("/") and not entry.path.startswith("/") and "\0" not in entry.path
        assert entry.place <= size and entry.size <= size
    for data in source.read_all(entries, LIMITS):
        assert isinstance(data, ImageRejected) or len(data) <= size * 1000


def test_mutated_tables(tmp_path: Path, survived: Counter[str]) -> None:
    draw = random.Random(3)
    for name, seed in mutants.tables().items():
        path = tmp_path / f"mutant.{name}"
        for _ in range(TABLES):
            data = mutants.mutated(seed, draw)
            path.write_bytes(data)
            with contextlib.suppress(DataError):
                check(Source([str(path)]), len(data))
            survived["mutants"] += 1


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.binary(max_size=2000),
    st.sampled_from([b"", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0"]),
)
def test_any_bytes_are_an_image_or_refused(data: bytes, start: bytes) -> None:
    with contextlib.suppress(ImageRejected):
        inspect(start + data, LIMITS)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, BLOCK - 1), st.binary(min_size=1, max_size=12)), max_size=8), st.booleans())
def test_any_header_is_a_member_or_refused(edits: list[tuple[int, bytes]], mended: bool) -> None:
    archive = bytearray(mutants.tars()["gnu"])
    for at, body in edits:
        archive[at : at + len(body)] = body
    if mended:  # so that what is behind the checksum is reached
        archive[148:156] = b"%06o\0 " % (sum(archive[:148]) + 8 * 32 + sum(archive[156:BLOCK]))
    found: list[Member] = []
    with contextlib.suppress(TarBroken):
        found += members(io.BytesIO(archive), len(archive))
    assert all(0 < member.offset <= len(archive) and 0 <= member.size <= len(archive) for member in found)


@pytest.mark.parametrize("size", [b"-0000001000", b"-1", b"+7", b"1_0", b"0o7", b"8"])
def test_a_size_in_other_than_octal_digits_is_refused(size: bytes) -> None:
    """A member of -512 bytes would be followed by itself."""
    archive = bytearray(mutants.special("a.png", tarfile.REGTYPE, data=b"a"))
    archive[124:136] = size.ljust(12, b"\0")
    archive[148:156] = b"%06o\0 " % (sum(archive[:148]) + 8 * 32 + sum(archive[156:BLOCK]))
    with pytest.raises(TarBroken, match="not a tar"):
        next(members(io.BytesIO(archive), len(archive)))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(st.characters(codec=None, exclude_characters="\0")))
def test_names_come_back_and_are_harmless(name: str) -> None:
    shown = printable(name)
    if not re.search("[\ud800-\udc7f\udd00-\udfff]", name):  # which no file system gives
        assert raw(shown) == name
    assert not re.search("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", shown)


@pytest.mark.skipif(find_spec("atheris") is None, reason="needs atheris, which is not made for this platform")
@pytest.mark.parametrize("parser", FUZZED)
def test_fuzzed_parsers(parser: str, tmp_path: Path, survived: Counter[str]) -> None:
    corpus, words = tmp_path / "corpus", tmp_path / "words"
    corpus.mkdir()
    for name, data in {"tars": mutants.small_tars, "columns": mutants.tables}.get(parser, dict)().items():
        (corpus / name).write_bytes(data)
    words.write_text("\n".join(f'"{word}"' for word in ["-", "+", r"\x80", "x", "L", "path=", "size=", "GNU.sparse"]))
    runs, seconds = FUZZED[parser]
    limits = [f"-runs={runs}", f"-max_total_time={seconds}", "-seed=1", "-print_final_stats=1"]
    here = Path(__file__).parent
    ran = subprocess.run(
        [sys.executable, str(here / "fuzz.py"), parser, *limits, f"-dict={words}",
         f"-artifact_prefix={tmp_path}/", str(corpus)],
        env={**os.environ, "PYTHONPATH": str(here.parents[1]), "PYTHONHASHSEED": "0"},
        capture_output=True, text=True, errors="replace", timeout=60,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-4000:]
    stats = dict(re.findall(r"stat::(\w+): +(\d+)", ran.stderr))
    assert int(stats["new_units_added"]) > 20  # it sees which inputs reach new code
    survived["fuzzed"] += int(stats["number_of_executed_units"])


class Executed:
    """Whoever unpickles this leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self._trace}",)


def hostile_tar(image: bytes, trace: Path, outside: Path) -> bytes:
    code = pickle.dumps(Executed(trace))
    evil = {
        "../../escaped.png": image,
        str(outside / "absolute.png"): image,
        "a/../../b.png": image,
        "twice.png": image,
        "./twice.png": image,
        "a.pkl": code, "a.pyd": code, "a.pth": code, "a.png": image, "a.py": b"raise SystemExit",
        "pickle.png": code,
        "nul\0.png": image,
        "\u202egnp.exe.png": image,
        "new\nline.png": image,
        "-rf.png": image,
        "x" * 5000 + ".png": image,
    }  # fmt: skip
    body = mutants.tar(evil)
    links = [
        mutants.special("link.png", tarfile.SYMTYPE, "/etc/passwd"),
        mutants.special("hard.png", tarfile.LNKTYPE, "/etc/passwd"),
        mutants.special("device.png", tarfile.CHRTYPE),
        mutants.special("pipe.png", tarfile.FIFOTYPE),
        mutants.special("folder.png", tarfile.DIRTYPE),
        mutants.special("strange.png", b"Z"),
        mutants.special("long name", b"L", size=40 << 20, data=bytes(40 << 20)),
        mutants.special("pax", b"x", size=40 << 20, data=bytes(40 << 20)),
        mutants.special("sparse.png", tarfile.GNUTYPE_SPARSE),
        mutants.special("last.png", tarfile.REGTYPE, size=len(image), data=image),
        mutants.special("bomb.png", tarfile.REGTYPE, size=1 << 40, data=image),
    ]
    return body[: body.rindex(image) + -(-len(image) // BLOCK) * BLOCK] + b"".join(links)


def test_a_hostile_source_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, survived: Counter[str]
) -> None:
    outside, source, work = tmp_path / "outside", tmp_path / "source", tmp_path / "work"
    for folder in (outside, source, work):
        folder.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(work))
    image = mutants.images()["png"]
    (source / "evil.tar").write_bytes(hostile_tar(image, outside / "trace", outside))
    draw = random.Random(4)
    for number, seed in enumerate(mutants.tars().values()):
        (source / f"mutant-{number}.tar").write_bytes(mutants.mutated(seed, draw))
    (source / "empty.tar").write_bytes(b"")
    (source / "gzip.tar").write_bytes(b"\x1f\x8b" + bytes(100))
    (source / "endless.tar").write_bytes(mutants.special("loop", b"x", size=2**62))
    artifact = shard(Source([str(source)]), tmp_path / "store")

    assert list(outside.iterdir()) == [] and list(work.iterdir()) == []
    inside = f"{outside}/absolute.png".strip("/")
    index = read_index(artifact)
    assert {path.removeprefix("evil.tar/") for path in index["path"] if path.startswith("evil.tar/")} == {
        r"\x2e\x2e/\x2e\x2e/escaped.png", inside, r"a/\x2e\x2e/\x2e\x2e/b.png", "twice.png", "twice.png#2", "a.png",
        r"\u202egnp.exe.png", r"new\x0aline.png", "-rf.png", "x" * 5000 + ".png", "last.png", "bomb.png",
    }  # fmt: skip
    refused = {row["path"]: row for row in read_quarantine(artifact).iter_rows(named=True)}
    assert refused["evil.tar/pickle.png"]["reason"] == "not_an_image"
    assert refused["evil.tar/pickle.png"]["bytes"].startswith(b"\x80")
    told = {"evil.tar": "it ends", "empty.tar": "it is empty", "gzip.tar": "it ends", "endless.tar": "it ends"}
    for name, why in told.items():
        assert refused[name]["reason"] == "unreadable" and refused[name]["detail"].startswith(why), refused[name]
    with tarfile.open(fileobj=io.BytesIO(artifact.read("shard-00000.tar"))) as tar:
        assert all(re.fullmatch(r"[0-9a-f]{20}\.(png|jpg|json)", member.name) for member in tar)
    survived["mutants"] += 8
