"""A folder that appears whole or not at all, and what is never touched meanwhile."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from latteflow.storage.errors import DataError, StorageError
from latteflow.storage.folders import carry, whole_folder


def write(folder: Path, content: str) -> None:
    with whole_folder(folder) as new:
        (new / "a.txt").write_text(content)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_it_is_new_or_takes_the_place_of_another(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write(folder, "first")
    (folder / "old.txt").touch()
    mode = folder.stat().st_mode
    write(folder, "second")
    assert names(folder) == {"a.txt"} and (folder / "a.txt").read_text() == "second"
    assert names(tmp_path) == {"model"} and mode == folder.stat().st_mode == (tmp_path.stat().st_mode | 0o055)
    (tmp_path / "link").symlink_to("model")
    write(tmp_path / "link", "third")
    assert (tmp_path / "link").is_symlink() and (folder / "a.txt").read_text() == "third"


@pytest.mark.parametrize("there", [False, True])
def test_a_failure_leaves_what_was_there(tmp_path: Path, there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    if there:
        write(folder, "first")
    before = names(tmp_path)
    with pytest.raises(KeyboardInterrupt), whole_folder(folder) as new:
        (new / "b.txt").touch()
        raise KeyboardInterrupt
    rename = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if ".new-" in self.name:
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(StorageError, match="No space left"):
        write(folder, "second")
    assert names(tmp_path) == before
    assert not there or (folder / "a.txt").read_text() == "first"


def test_where_no_folder_can_appear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for place, message in [
        (tmp_path / "file", "is a file"), (tmp_path / "dangling", "a link to nothing"), (Path("."), "working folder"),
        (tmp_path / "no" / "model", "no folder .*no to put it into"), (Path("/proc"), "a mount point"),
    ]:  # fmt: skip
        with pytest.raises(DataError, match=message):
            write(place, "")
    assert names(tmp_path) == {"file", "dangling", "here"}


def test_what_a_killed_process_left_goes_after_a_day(tmp_path: Path) -> None:
    old, young, other = (tmp_path / f".model.new-{digit * 32}" for digit in "012")
    other = tmp_path / ".model.new-notes"
    for each in (old, young, other):
        each.mkdir()
    os.utime(old, (0, 0))
    os.utime(other, (0, 0))
    write(tmp_path / "model", "")
    assert names(tmp_path) == {"model", young.name, other.name}


def test_other_files_are_carried_over(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    (source / "deep").mkdir(parents=True)
    target.mkdir()
    for name in ("mine.jpg", "deep/x.jpg", "old.json", "both.txt"):
        (source / name).write_text("source")
    (source / "link").symlink_to("nowhere")
    (target / "both.txt").write_text("target")
    carry(source, target, without={"old.json"})
    assert names(target) == {"mine.jpg", "deep", "link", "both.txt"}
    assert (target / "both.txt").read_text() == "target" and (target / "deep" / "x.jpg").read_text() == "source"


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    """Whoever writes next first gives the earlier folder its name back, however long ago that was."""
    folder = tmp_path / "model"
    write(folder, "first")
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom latteflow.storage.folders import whole_folder\n"
        "rename = Path.rename\n"
        "def killed(self, target):\n    rename(self, target)\n    os.kill(os.getpid(), 9)\n"
        "Path.rename = killed\nwith whole_folder(Path(sys.argv[1])) as new:\n    (new / 'a.txt').write_text('second')\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(folder)], check=False).returncode == -9
    assert not folder.exists()
    for each in tmp_path.iterdir():
        os.utime(each, (0, 0))
    with pytest.raises(RuntimeError), whole_folder(folder):
        raise RuntimeError
    assert (folder / "a.txt").read_text() == "first" and names(tmp_path) == {"model"}
