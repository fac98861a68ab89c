"""Make vLLM's environment that of a GPU worker: run this with its interpreter, from the project's root.

Prefect 3.8.8 asks for fastapi >= 0.139 and vLLM for < 0.137, so pip finds no set of versions that pleases both. Only
Prefect's *server* needs that fastapi; a worker and its runs are clients, and were seen to work with vLLM's (0.136.3).
So Prefect goes in without its requirements, then these, but for the two that vLLM holds down. `pip check` will complain
of those. Never start a server from this environment.
"""

import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

HELD_BY_VLLM = {"fastapi", "starlette"}
NOT_FOR_WORKERS = {
    "fastapi", "torch", "torchvision", "open_clip_torch", "timm", "transformers", "tokenizers", "safetensors", "numpy",
    "pillow", "altair", "vl-convert-python", "webdataset",
}  # fmt: skip
"""Of latteflow's own requirements: what vLLM brings in versions of its own, and what only the other stages use."""


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *arguments], check=True)


def needed(requirements: list[str], without: set[str]) -> list[str]:
    """Requirements that apply here, as texts that pip takes."""
    from packaging.requirements import Requirement

    found = [Requirement(each) for each in requirements]
    kept = [each for each in found if each.name.lower() not in without]
    return [str(each) for each in kept if each.marker is None or each.marker.evaluate({"extra": ""})]


def main() -> None:
    ours = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    prefect = next(each for each in ours["dependencies"] if each.startswith("prefect"))
    pip("packaging")
    pip("--no-deps", prefect)
    pip(*needed(metadata.requires("prefect") or [], HELD_BY_VLLM))
    pip(*needed(ours["dependencies"], NOT_FOR_WORKERS | {"prefect"}), *ours["optional-dependencies"]["s3"])
    pip("--no-deps", "--editable", ".")


if __name__ == "__main__":
    main()
