"""Tokens of prompts as `latteflow plan` reckons them, beside those that vLLM counts, for families that people use.

    python -m benchmarks.tokens [--only qwen2_vl ...]

A tiny model with random weights of each family, with the processor settings of a published one, is made and asked in
the environment of `make test-vllm` (CPU); here its processor alone is asked. Prints the table of docs/describers.md and
fails where both are more than 10 % apart. torchvision, which most families need, does not import beside the CPU build
of torch, as its compiled operators are not there; their names are defined first, and nothing here calls them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))
MOST_APART = 0.1
ASKED = "Describe what the picture shows."
SIZES = [[(1024, 768)], [(640, 480)], [(300, 500)], [(672, 672)], [(224, 224), (400, 300)]]
"""Of the images of each prompt; 672 x 672 is the collage of a group."""
OPERATORS = """
nms qnms roi_align _roi_align_backward ps_roi_align _ps_roi_align_backward roi_pool _roi_pool_backward ps_roi_pool
_ps_roi_pool_backward deform_conv2d _deform_conv2d_backward
"""
STAND_IN = f"""
import torch
library = torch.library.Library("torchvision", "DEF")
for name in {OPERATORS.split()!r}:
    library.define(name + "(Tensor x) -> Tensor")
"""
_WORDS = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 128, "intermediate_size": 256}
_WORDS |= {"num_key_value_heads": 4, "max_position_embeddings": 16384}
_WORDS |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SEEN = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64, "intermediate_size": 128}


def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    chosen = options.parse_args().only
    from engines.tiny_vlm import ON_CPU, vllm_python

    from latteflow.models.settings import VllmSettings
    from latteflow.models.texts.describers.tokens import prompt_tokens

    shown = [" and ".join(f"{w} x {h}" for w, h in sizes) for sizes in SIZES]
    sys.stdout.write(f"| family | {' | '.join(shown)} |\n{'| --- ' * (len(SIZES) + 1)}|\n")
    worst = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        beside = Path(scratch) / "beside"
        install = [vllm_python(), "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(beside)]
        subprocess.run([*install, "torchvision==0.28.0"], check=True)
        (beside / "sitecustomize.py").write_text(STAND_IN)  # in the processes that vLLM starts, too
        environment = {**os.environ, **ON_CPU, "PYTHONPATH": f"{ROOT}:{beside}"}
        for name in chosen:
            folder = Path(scratch) / name
            command = [vllm_python(), "-m", "benchmarks.tokens", name, str(folder)]
            out = subprocess.run(
                command, check=True, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
            ).stdout
            counted = json.loads(out.splitlines()[-1])
            settings = VllmSettings(kind="vllm", model=str(folder))
            ours = [prompt_tokens(settings, [(ASKED, sizes)]) for sizes in SIZES]
            cells = [f"{reckoned or 0:.0f} / {theirs}" for reckoned, theirs in zip(ours, counted, strict=True)]
            sys.stdout.write(f"| {name} | {' | '.join(cells)} |\n")
            sys.stdout.flush()
            worst = max(worst, *(abs((a or 0) / b - 1) for a, b in zip(ours, counted, strict=True)))
    if worst > MOST_APART:
        raise SystemExit(f"{worst:.0%} apart")


# --- in the environment of vLLM ---------------------------------------------------------------------------------------


def build_and_count(name: str, folder: str) -> None:
    """Write the model and its processor, and print what vLLM counts, as JSON."""
    import torch

    from latteflow.models.settings import VllmSettings
    from latteflow.models.texts.describers import Prompt
    from latteflow.models.texts.describers.vllm import open_vllm

    torch.manual_seed(0)
    for part in FAMILIES[name]():
        part.save_pretrained(folder)
    engine = open_vllm(
        VllmSettings(
            kind="vllm", model=folder, dtype="float32", max_context=8192, max_batch=2, max_tokens=2,
            extra={"enforce_eager": True, "load_format": "dummy"},
        )
    )  # fmt: skip
    prompts = [Prompt(ASKED, lambda sizes=sizes: [Image.new("RGB", size) for size in sizes], 0) for sizes in SIZES]
    found = dict(engine.generate(prompts))
    assert all(found[place].finish_reason != "error" for place in found), found
    sys.stdout.write(json.dumps([found[place].prompt_tokens for place in range(len(SIZES))]) + "\n")


def _tokenizer(*special: str, **named: str) -> Any:
    """Bytes with a few merges, and the marks of a family."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw: Any = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    names = ["<pad>", "<|im_start|>", "<|im_end|>", *special]
    letters = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        [ASKED], trainers.BpeTrainer(vocab_size=600, special_tokens=names, initial_alphabet=letters)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=names[1], eos_token=names[2], pad_token=names[0],
        additional_special_tokens=names[2:], extra_special_tokens=named or None,
    )  # fmt: skip


def _chat(image: str) -> str:
    return (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
        "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
        f"{image}{{% else %}}{{{{ part['text'] }}}}{{% endif %}}{{% endfor %}}{{% endif %}}<|im_end|>\n{{% endfor %}}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def _qwen(kind: str, vision: dict[str, Any], **rope: Any) -> tuple[Any, Any]:
    import transformers as hf

    words = _tokenizer("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    marks = {"image": "<|image_pad|>", "video": "<|video_pad|>", "vision_start": "<|vision_start|>"}
    ids = {f"{name}_token_id": words.convert_tokens_to_ids(mark) for name, mark in marks.items()}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6], **rope}
    text = {**_WORDS, "vocab_size": len(words), "head_dim": 32, "rope_scaling": rope, "rope_parameters": rope}
    config = getattr(hf, f"{kind}Config")(vision_config={"depth": 2, "num_heads": 4, **vision}, text_config=text, **ids)
    side = vision["patch_size"]
    videos = hf.Qwen3VLVideoProcessor if kind.startswith("Qwen3") else hf.Qwen2VLVideoProcessor
    template = _chat("<|vision_start|><|image_pad|><|vision_end|>")
    pixels, clips = hf.Qwen2VLImageProcessor(patch_size=side), videos(patch_size=side)
    processor = getattr(hf, f"{kind}Processor")(pixels, words, video_processor=clips, chat_template=template)
    return getattr(hf, f"{kind}ForConditionalGeneration")(config), processor


def _qwen2() -> tuple[Any, Any]:
    return _qwen("Qwen2VL", {"embed_dim": 64, "hidden_size": 128, "patch_size": 14, "mlp_ratio": 2})


def _qwen2_5() -> tuple[Any, Any]:
    vision = {"hidden_size": 64, "out_hidden_size": 128, "patch_size": 14, "intermediate_size": 128}
    return _qwen("Qwen2_5_VL", {**vision, "fullatt_block_indexes": [1]})


def _qwen3() -> tuple[Any, Any]:
    vision = {"hidden_size": 64, "out_hidden_size": 128, "patch_size": 16, "intermediate_size": 128}
    more = {"deepstack_visual_indexes": [1], "num_position_embeddings": 256}
    return _qwen("Qwen3VL", {**vision, **more}, mrope_interleaved=True)


def _llava_onevision() -> tuple[Any, Any]:
    import transformers as hf

    words = _tokenizer("<image>", "<video>")
    ids = {f"{name}_token_index": words.convert_tokens_to_ids(f"<{name}>") for name in ("image", "video")}
    vision = hf.SiglipVisionConfig(**_SEEN, image_size=384, patch_size=14, vision_use_head=False)
    tiles = [[384 * i, 384 * j] for i in range(1, 7) for j in range(1, 7)]
    text = hf.Qwen2Config(**_WORDS, vocab_size=len(words))
    config = hf.LlavaOnevisionConfig(vision_config=vision, text_config=text, image_grid_pinpoints=tiles, **ids)
    pixels = hf.LlavaOnevisionImageProcessor(size={"height": 384, "width": 384}, image_grid_pinpoints=tiles)
    processor = hf.LlavaOnevisionProcessor(
        pixels, words, hf.LlavaOnevisionVideoProcessor(), num_image_tokens=729, vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9", chat_template=_chat("<image>\n"),
    )  # fmt: skip
    return hf.LlavaOnevisionForConditionalGeneration(config), processor


def _internvl() -> tuple[Any, Any]:
    import transformers as hf

    marks = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    words = _tokenizer(*marks.values(), "<video>", **marks, video_token="<video>")
    size = {"height": 448, "width": 448}
    vision = hf.InternVLVisionConfig(**_SEEN, image_size=[448, 448], patch_size=[14, 14])
    text = hf.Qwen2Config(**_WORDS, vocab_size=len(words))
    image = words.convert_tokens_to_ids("<IMG_CONTEXT>")
    config = hf.InternVLConfig(vision_config=vision, text_config=text, image_token_id=image)
    pixels = hf.GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=12)
    processor = hf.InternVLProcessor(
        pixels,
        words,
        hf.InternVLVideoProcessor(size=size),
        image_seq_length=256,
        chat_template=_chat("<IMG_CONTEXT>\n"),
    )
    return hf.InternVLForConditionalGeneration(config), processor


def _idefics3() -> tuple[Any, Any]:
    import transformers as hf

    marks = {"image_token": "<image>", "fake_image_token": "<fake_token_around_image>"}
    marks |= {"global_image_token": "<global-img>", "end_of_utterance_token": "<end_of_utterance>"}
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    words = _tokenizer(*marks.values(), *tiles, **marks)
    vision = hf.Idefics3VisionConfig(**_SEEN, image_size=512, patch_size=16)
    text = hf.LlamaConfig(**_WORDS, vocab_size=len(words))
    image = words.convert_tokens_to_ids("<image>")
    config = hf.Idefics3Config(vision_config=vision, text_config=text, image_token_id=image, scale_factor=4)
    pixels = hf.Idefics3ImageProcessor(
        size={"longest_edge": 2048}, max_image_size={"longest_edge": 512}, do_image_splitting=True
    )
    processor = hf.Idefics3Processor(pixels, words, image_seq_len=64, chat_template=_chat("<image>"))
    return hf.Idefics3ForConditionalGeneration(config), processor


def _gemma3() -> tuple[Any, Any]:
    import transformers as hf

    marks = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    words = _tokenizer(*marks.values(), "\n", "\n\n", "\n\n\n", "\n\n\n\n", **marks)  # line breaks as Gemma's own has
    ids = [words.convert_tokens_to_ids(mark) for mark in marks.values()]
    indices = dict(zip(("boi_token_index", "eoi_token_index", "image_token_index"), ids, strict=True))
    config = hf.Gemma3Config(
        vision_config=hf.SiglipVisionConfig(**_SEEN, image_size=896, patch_size=14, vision_use_head=False),
        text_config=hf.Gemma3TextConfig(**_WORDS, vocab_size=len(words), head_dim=32, sliding_window=512),
        mm_tokens_per_image=256, **indices,
    )  # fmt: skip
    pixels = hf.Gemma3ImageProcessor(size={"height": 896, "width": 896})
    processor = hf.Gemma3Processor(pixels, words, image_seq_length=256, chat_template=_chat("<start_of_image>"))
    return hf.Gemma3ForConditionalGeneration(config), processor


FAMILIES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "qwen2_vl": _qwen2,
    "qwen2_5_vl": _qwen2_5,
    "qwen3_vl": _qwen3,
    "llava_onevision": _llava_onevision,
    "internvl": _internvl,
    "idefics3": _idefics3,
    "gemma3": _gemma3,
}

if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] in FAMILIES:
        build_and_count(sys.argv[1], sys.argv[2])
    else:
        main()
