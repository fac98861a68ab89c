"""What is installed: one package, whole, with the files that are no Python."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("flows", "tasks", "models", "storage", "domains")


@pytest.mark.slow
def test_a_wheel_is_one_package_with_all_that_git_knows(tmp_path: Path) -> None:
    build = [sys.executable, "-c", "import setuptools.build_meta as b, sys; print(b.build_wheel(sys.argv[1]))"]
    listed = subprocess.run(["git", "ls-files", *ROOMS, "latteflow"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git checkout")
    source = tmp_path / "source"
    for name in [*listed.stdout.split(), "pyproject.toml", "README.md", "LICENSE"]:
        place = source / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            place.symlink_to((ROOT / name).readlink())
        else:
            place.write_bytes((ROOT / name).read_bytes())
    subprocess.run([*build, str(tmp_path)], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in inside if ".dist-info" not in name} == {"latteflow"}
    ours = {f"latteflow/{name}" for name in listed.stdout.split() if name.split("/")[0] in ROOMS}
    assert {name for name in ours - inside if not name.endswith("README.md")} == set()
