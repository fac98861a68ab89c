"""Full disks and wrong clocks: a clear error or no difference at all."""

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.harness import Clean, Driver, Tally, difference, repeated_parts, tree

from latteflow.storage.objects import ObjectStore

pytestmark = pytest.mark.slow


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("free", [4, 16, 40, 72, 96])
def test_a_full_disk_stops_the_run_and_harms_nothing(
    driver: Driver, small: Path, clean: Clean, disk: Path, tmp_path: Path, tally: Tally, free: int
) -> None:
    tally.inflicted["full disk"] += 1
    fill = disk / "fill"
    blocks = os.statvfs(disk)
    fill.write_bytes(bytes(blocks.f_bavail * blocks.f_frsize - free * 1024))
    command = {"work": "storage", "domain": small, "store": disk / "store", "journal": tmp_path / "journal"}
    answer = driver.run(**command)
    assert answer["statuses"] == [1]
    assert "the disk is full: free some space and run again; finished parts are kept" in answer["stderr"][0]
    store = ObjectStore(str(disk / "store"))
    for key, data in tree(store).items():  # whatever is there is whole
        assert "/data/" not in key or key.split(".")[1] == hashlib.sha256(data).hexdigest()[:16]
        assert clean.tree[key] == data
    assert not list((disk / "store").rglob(".tmp-*"))
    fill.unlink()
    driver.finish(**command)
    assert difference(tree(store), clean.tree) == {}
    assert repeated_parts(tmp_path / "journal") <= 1
    tally.survived["full disk"] += 1


@pytest.mark.parametrize("clock", [0, 4_102_444_800, "wild"], ids=["1970", "2100", "wild"])
def test_no_artifact_depends_on_the_clock(
    driver: Driver, small: Path, clean: Clean, quick: Path, tally: Tally, clock: float | str
) -> None:
    tally.inflicted["clock"] += 1
    folder = quick / "domain"
    shutil.copytree(small.parent, folder)
    for number, path in enumerate(sorted((folder / "train").iterdir())):
        os.utime(path, ((number % 2) * 4_102_444_800,) * 2)
    command = {"work": "storage", "domain": folder / "domain.yaml", "store": quick / "store"}
    kill = {"moment": "written", "commit": clean.commits // 2}
    assert driver.run(**command, clock=clock, kill=kill)["statuses"] == [-9]
    tally.inflicted["kill commit"] += 1
    for path in (quick / "store").rglob("*"):
        os.utime(path, (0, 0))
    driver.finish(**command, clock=4_102_444_800)
    assert difference(tree(ObjectStore(str(quick / "store"))), clean.tree) == {}
    # What the killed process left was a day older than the next write into its folder, by the folder's own clock.
    assert not list((quick / "store").rglob(".tmp-*"))
    tally.survived["kill commit"] += 1
    tally.survived["clock"] += 1
