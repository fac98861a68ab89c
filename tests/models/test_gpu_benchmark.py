"""The benchmark for a GPU: every part runs in toy size, and without a GPU it says so and ends well."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from benchmarks import gpu


@pytest.mark.slow
@pytest.mark.parametrize("part", list(gpu.PARTS))
def test_a_part_runs_in_toy_size(part: str, capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main(["--toy", "--parts", part])
    lines = capsys.readouterr().out.splitlines()
    assert "toy size" in lines[0] and lines[-1].endswith("s in all")
    told = lines[1:-1]
    assert told and not any("does not fit" in line or "left out" in line for line in told)
    expected = {"step": 8, "embed": 1, "towers": 3, "clamp": 5, "transduction": 2}
    assert len(told) == expected[part] + (2 if part == "step" and torch.cuda.is_available() else 0)


def test_a_part_that_begins_too_late_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main(["--toy", "--minutes", "0", "--parts", "embed"])
    assert "embed: left out" in capsys.readouterr().out


@pytest.mark.slow
def test_without_a_gpu_it_is_skipped() -> None:
    code = "import torch; torch.cuda.is_available = lambda: False; from benchmarks.gpu import main; main([])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "no GPU: nothing is measured; --toy shows that it runs\n"
