#!/usr/bin/env bash
# open_clip 3.3.0: a `local-dir:` folder with weights and tokenizer still asks the model hub for its text tower.
#
# Guess: a folder as `save_pretrained` writes it loads without a network; every weight and the tokenizer are in it.
# Seen: where the text tower is of transformers, its shape is not in open_clip_config.json, only its name on the hub: offline
#     and without that model in the cache it does not load. A path there must be absolute, or belong to the working folder.
# latteflow: exports the tower's configuration beside it, text_config.json, and reads that; open_clip alone asks the hub.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet open_clip_torch==3.3.0 torch==2.14.1 torchvision==0.29.1 timm==1.0.31 transformers==5.24.0
HF_HUB_OFFLINE=1 HF_HOME="$folder/hub" venv/bin/python -I - <<'EOF'
import json
from pathlib import Path

import open_clip
from safetensors.torch import save_file
from transformers import RobertaConfig

shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 60}
RobertaConfig(**shape).save_pretrained("tower")
text = {"hf_model_name": "tower", "hf_model_pretrained": False}
vision = {"layers": 1, "width": 64, "head_width": 32, "image_size": 32, "patch_size": 16}
config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
model = open_clip.CustomTextCLIP(**config)
Path("model").mkdir()
save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, "model/open_clip_model.safetensors")


def load(tower: str) -> str:
    text["hf_model_name"] = tower
    Path("model/open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    try:
        return type(open_clip.create_model("local-dir:model")).__name__
    except OSError as error:
        return f"OSError: {str(error).splitlines()[0]}"


found = {tower: load(tower) for tower in ("roberta-base", "tower")}
print(found)
assert found["roberta-base"].startswith("OSError") and found["tower"] == "CustomTextCLIP"
EOF
