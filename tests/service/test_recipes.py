"""The recipes of images, without Docker: what they install can be installed, together, into an empty environment."""

import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from engines.tiny_vlm import ROOT

pytestmark = pytest.mark.slow


def commands(recipe: Path) -> list[str]:
    """What its RUN lines run."""
    return re.findall(r"^RUN (.*)$", recipe.read_text(), re.MULTILINE)


def test_what_the_image_installs_goes_together(tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    (install,) = commands(ROOT / "deploy" / "Dockerfile")
    pip, arguments = install.split(" ", 1)
    assert pip == "pip" and arguments.startswith("install --no-cache-dir --editable ")
    # Gigabytes are not fetched: pip chooses every version, as for the image, and stops there.
    chosen = f"{tmp_path / 'venv' / 'bin' / 'pip'} {arguments.replace('--no-cache-dir --editable', '--dry-run')}"
    done = subprocess.run(["bash", "-c", chosen], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    (would,) = re.findall(r"^Would install (.*)$", done.stdout, re.MULTILINE)
    names = {each.rpartition("-")[0].lower() for each in would.split()}
    assert {"latteflow", "prefect", "prefect-docker", "prefect-kubernetes", "s3fs", "openai", "torch"} <= names


def test_the_script_that_the_other_image_runs_is_there() -> None:
    (install,) = commands(ROOT / "deploy" / "Dockerfile.gpu")
    assert install == "python3 deploy/install_worker.py"  # which `make .venv-vllm/.installed` runs
    subprocess.run([sys.executable, "-m", "py_compile", str(ROOT / "deploy" / "install_worker.py")], check=True)
