"""One server for the tests of this folder."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from engines import tiny_vlm as recipe
from engines.tiny_vlm import ROOT
from service.harness import Service
from service.harness import service as running

from chatserver import ChatServer


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A server with everything deployed, and a worker for the pool `cpu`."""
    with running(tmp_path_factory.mktemp("service")) as found:
        found.deploy()
        found.prefect("automation", "create", "--from-file", "deploy/automations.yaml")
        found.worker("cpu")
        yield found


@pytest.fixture
def chat() -> Iterator[ChatServer]:
    chat = ChatServer()
    yield chat
    chat.close()


@pytest.fixture(scope="session")
def vllm_python() -> str:
    """The interpreter of GPU workers."""
    python = ROOT / ".venv-vllm/bin/python"
    if not python.exists():
        pytest.skip("needs `make .venv-vllm/.installed`")
    return str(python)


@pytest.fixture(scope="session")
def tiny_vlm(vllm_python: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    subprocess.run([vllm_python, recipe.__file__, folder], check=True, timeout=300)
    return folder
