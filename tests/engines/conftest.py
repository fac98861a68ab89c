"""The tiny model."""

import os
import subprocess
from pathlib import Path

import pytest
from engines import tiny_vlm as recipe
from engines.tiny_vlm import ON_CPU, vllm_python

os.environ |= ON_CPU


@pytest.fixture(scope="session")
def tiny_vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vision-language model of a few hundred thousand random weights."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    subprocess.run([vllm_python(), recipe.__file__, folder], check=True, timeout=300)
    return folder
