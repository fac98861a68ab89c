"""What is installed: one package, whole, with the files that are no Python."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("flows", "tasks", "models", "storage", "domains")


def known_to_git() -> list[str]:
    """Files that a wheel is made of."""
    listed = subprocess.run(["git", "ls-files", *ROOMS, "latteflow"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git checkout")
    return listed.stdout.split()


def build_wheel(folder: Path) -> Path:
    """A wheel of what git knows, in a folder."""
    build = [sys.executable, "-c", "import setuptools.build_meta as b, sys; print(b.build_wheel(sys.argv[1]))"]
    source = folder / "source"
    for name in [*known_to_git(), "pyproject.toml", "README.md", "LICENSE"]:
        place = source / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            place.symlink_to((ROOT / name).readlink())
        else:
            place.write_bytes((ROOT / name).read_bytes())
    subprocess.run([*build, str(folder)], cwd=source, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.mark.slow
def test_a_wheel_is_one_package_with_all_that_git_knows(tmp_path: Path) -> None:
    inside = set(zipfile.ZipFile(build_wheel(tmp_path)).namelist())
    assert {name.split("/")[0] for name in inside if ".dist-info" not in name} == {"latteflow"}
    ours = {f"latteflow/{name}" for name in known_to_git() if name.split("/")[0] in ROOMS}
    assert {name for name in ours - inside if not name.endswith("README.md")} == set()
