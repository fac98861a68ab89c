"""Every architecture family of open_clip through the product, beside the libraries that read its folders alone.

    python -m benchmarks.models [--only NAME ...]

Each family is a small model with random weights in a folder that open_clip reads by `local-dir:`: one of open_clip's
own configurations with fewer layers, and less width where that can be. The folder is embedded, tuned (LatteCLIP, both
towers: `train: projections`, then `train: all`), exported (open_clip, ONNX, transformers) and asked by `latteflow
predict`. Prints the table of docs/models.md. A number is the largest absolute difference between unit features by the
product and by the library alone, of oblong pictures and of texts, float32 on the processor; of `predict` it is between
probabilities. A dash is refused, with the reason below the table. Ten minutes or more, most of it the exporter of ONNX.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import polars as pl
import timm
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models import register_model
from torch import Tensor

from latteflow.flows.pipeline import run_plainly
from latteflow.models.errors import ModelError
from latteflow.models.ship import to_transformers
from latteflow.models.towers import clip
from latteflow.models.towers.folder import (
    HEAD_FILE,
    ONNX_FILE,
    OPEN_CLIP_CONFIG,
    OPEN_CLIP_WEIGHTS,
    SETTINGS_FILE,
    TRANSFORMERS,
)
from latteflow.storage.shards import read_index
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.features import Features, read_features
from latteflow.tasks.core.stage import StageResult, open_store
from latteflow.tasks.ship.export import Format, export_tuned
from latteflow.tasks.ship.predict import predict
from latteflow.tasks.tune.models import chosen_model, text_reader, tuned_features

MOST_DIFFERENCE = 1e-4
"""More is a silent difference: the command fails."""
COLUMNS = {
    "images": "images",
    "texts": "texts",
    "projections": "export after `projections`",
    "all": "after `all`",
    "predict": "`predict`",
    "onnx": "`--onnx`",
    "transformers": "`--transformers`",
}
CLASSES = ["robin", "wren", "jay"]
TEXTS = ["a photo of a robin.", "Two wrens' nest, in the snow (1999)!", "a jay"]
IMAGES, VOCABULARY = 12, 300
Row = dict[str, float | str]


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        name: of the family.
        like: open_clip's configuration that it is a small form of; its other models behave as it does.
        vision, text, rest: what is other than there, in the towers and beside them.
        shrink: arguments of timm's tower that make it small; open_clip's configuration cannot say them.
        preprocess: of pictures, where it is not open_clip's default.
        tower: a text tower of transformers: its configuration, with a tokenizer that is trained here.
    """

    name: str
    like: str
    vision: Mapping[str, Any] = field(default_factory=dict)
    text: Mapping[str, Any] = field(default_factory=dict)
    rest: Mapping[str, Any] = field(default_factory=dict)
    shrink: Mapping[str, Any] = field(default_factory=dict)
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    tower: Callable[[], Any] | None = None


_DIM: dict[str, Any] = {"embed_dim": 64}
_VIT = {"layers": 2, "width": 64, "head_width": 32, "image_size": 64, "patch_size": 16}
_RESNET = {"layers": [1, 1, 1, 1], "width": 16, "image_size": 64}
_TEXT = {"layers": 2, "width": 64, "heads": 2}
_WORDS = {**_TEXT, "vocab_size": VOCABULARY}
_DECODER = {"context_length": 76, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1, "attn_pooler_heads": 2}
_SQUASH = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
_APPLE = {"mean": [0.0] * 3, "std": [1.0] * 3, "interpolation": "bilinear"}
_ATTO = {"timm_model_name": "convnext_atto", "image_size": 96}
_TWO = {"depth": 2}
_BERT = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_BERT |= {"vocab_size": VOCABULARY, "max_position_embeddings": 130, "pad_token_id": 1}
_M2M = {"d_model": 48, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64}
_M2M |= {"decoder_attention_heads": 2, "decoder_ffn_dim": 64, "vocab_size": VOCABULARY, "pad_token_id": 1}
_T5 = {"d_model": 48, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": VOCABULARY}
_NLLB = functools.partial(transformers.M2M100Config, **_M2M)
_ROBERTA = functools.partial(transformers.RobertaConfig, **_BERT)
FAMILIES = [
    Family("ViT", "ViT-B-32", _VIT, _TEXT, _DIM),
    Family("ViT, quick GELU", "ViT-B-32-quickgelu", _VIT, _TEXT, _DIM),
    Family("ViT, other size, squashed", "ViT-B-16-plus-240", {**_VIT, "image_size": 80}, _TEXT, _DIM, {}, _SQUASH),
    Family("ViT, oblong", "ViT-B-16", {**_VIT, "image_size": [48, 80]}, _TEXT, _DIM),
    Family("ViT, layer scale", "ViT-S-16-alt", {**_VIT, "ls_init_value": 0.1}, {**_TEXT, "ls_init_value": 0.1}, _DIM),
    Family("CLIPA", "ViT-L-14-CLIPA", _VIT, _WORDS, _DIM, {}, _SQUASH),
    Family("MetaCLIP 2 (worldwide)", "ViT-H-14-worldwide", _VIT, _WORDS, _DIM),
    Family("ResNet", "RN50", _RESNET, _TEXT, _DIM),
    Family("ResNet, quick GELU", "RN50-quickgelu", _RESNET, _TEXT, _DIM),
    Family("CoCa", "coca_ViT-B-32", {**_VIT, "attn_pooler_heads": 2}, _TEXT, {**_DIM, "multimodal_cfg": _DECODER}),
    Family(
        "CoCa with RoBERTa", "coca_roberta-ViT-B-32", _VIT, {}, {**_DIM, "multimodal_cfg": _DECODER}, tower=_ROBERTA
    ),
    Family("SigLIP", "ViT-B-16-SigLIP-256", {}, _WORDS, {}, _TWO, _SQUASH),
    Family("SigLIP 2", "ViT-B-32-SigLIP2-256", {}, _WORDS, {}, _TWO, _SQUASH),
    Family("NaFlex (timm), as fixed size", "ViT-B-16-SigLIP2-256",
           {"timm_model_name": "naflexvit_base_patch16_siglip"}, _WORDS, {}, _TWO, _SQUASH),
    Family("EVA-02", "EVA02-B-16", {}, _TEXT, {}, _TWO),
    Family("MobileCLIP S", "MobileCLIP-S1", {"timm_model_name": "fastvit_mci0"}, _TEXT, {}, {}, _APPLE),
    Family("MobileCLIP B", "MobileCLIP-B", {}, _TEXT, {}, _TWO, _APPLE),
    Family("MobileCLIP2 S", "MobileCLIP2-S0", {}, _TEXT, {}, {}, _APPLE),
    Family("MobileCLIP2 L", "MobileCLIP2-L-14", {}, _TEXT, {}, _TWO, _APPLE),
    Family("Perception Encoder", "PE-Core-T-16-384", {}, _TEXT, {}, _TWO, _SQUASH),
    Family("ViTamin", "ViTamin-S", {}, _TEXT),
    Family("ConvNeXt", "convnext_base_w_320", _ATTO, _TEXT, _DIM),
    Family("ConvNeXt, MLP head", "convnext_large_d", _ATTO, _TEXT, _DIM),
    Family("Swin", "swin_base_patch4_window7_224", {"timm_model_name": "swin_tiny_patch4_window7_224"}, _TEXT, {},
           {"depths": (1, 1, 1, 1)}),
    Family("ViT of timm, relative positions", "vit_relpos_medium_patch16_cls_224", {}, _TEXT, {}, _TWO),
    Family("ViT of timm, mean of patches", "vit_medium_patch16_gap_256", {}, _TEXT, {}, _TWO),
    Family("RoBERTa", "roberta-ViT-B-32", _VIT, {}, _DIM, tower=_ROBERTA),
    Family("XLM-RoBERTa, no text projection", "xlm-roberta-base-ViT-B-32", _VIT, {"hf_proj_type": None},
           {"embed_dim": 48}, tower=functools.partial(transformers.XLMRobertaConfig, **_BERT)),
    Family("mT5", "mt5-base-ViT-B-32", _VIT, {}, _DIM, tower=functools.partial(transformers.MT5Config, **_T5)),
    Family("NLLB", "nllb-clip-base", _VIT, {}, _DIM, tower=_NLLB),
    Family("NLLB with SigLIP", "nllb-clip-base-siglip", {"image_size": 384}, {}, {}, _TWO, _SQUASH, _NLLB),
]  # fmt: skip


def main() -> None:
    """Print the table; fail where something differs and nobody said so."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", nargs="+", metavar="NAME", help="families by name")
    chosen = options.parse_args().only or [family.name for family in FAMILIES]
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    rows = {}
    for family in FAMILIES:
        if family.name in chosen:
            with tempfile.TemporaryDirectory() as scratch:
                rows[family.name] = measure(family, Path(scratch))
            sys.stderr.write(f"{family.name}: {rows[family.name]}\n")
    sys.stdout.write(table(rows))
    if not all(cell <= MOST_DIFFERENCE for row in rows.values() for cell in row.values() if isinstance(cell, float)):
        raise SystemExit(f"a number is above {MOST_DIFFERENCE:g}")


def table(rows: Mapping[str, Row]) -> str:
    """Markdown: the table, then why cells are empty."""
    like = {family.name: family.like for family in FAMILIES}
    packages = {"open_clip": open_clip, "timm": timm, "transformers": transformers, "torch": torch}
    versions = ", ".join(f"{name} {module.__version__.split('+')[0]}" for name, module in packages.items())
    lines = [f"*Made by `python -m benchmarks.models` with {versions}.*", ""]
    lines += [f"| family | small form of | {' | '.join(COLUMNS.values())} |", "| --- " * (len(COLUMNS) + 2) + "|"]
    reasons: dict[str, list[str]] = {}
    for name, row in rows.items():
        cells = [f"{cell:.0e}" if isinstance(cell, float) else "-" for cell in (row.get(each) for each in COLUMNS)]
        lines.append(f"| {name} | `{like[name]}` | {' | '.join(cells)} |")
        for column, cell in row.items():
            if isinstance(cell, str):
                reasons.setdefault(f"{COLUMNS[column]}: {cell}", []).append(name)
    lines += ["", "Refused, before any work unless it says otherwise:", ""]
    lines += [f"- {reason} ({', '.join(names)})" for reason, names in reasons.items()]
    return "\n".join(lines) + "\n"


def measure(family: Family, folder: Path) -> Row:
    """The cells of one family by column: a largest difference, or what the product said."""
    build(family, folder / "base")
    paths = draw(folder / "images")
    plain = Plain(folder / "base")
    row: Row = {}
    for train in ("projections", "all"):
        domain = _domain(folder, train)
        results = {result.label: result for result in run_plainly(domain)}
        found = read_features(open_store(domain).open(results["embed train"].ref))
        order = [paths[name] for name in _names(domain, results, found)]
        row["images"] = apart(found.features, plain.images(plain.pixels(order)))
        row["texts"] = apart(clip.load(domain.clip).text_features(TEXTS), plain.texts(TEXTS))
        formats = _formats(domain, row) if train == "projections" else []
        out = folder / train
        try:
            export_tuned(domain, results["tune"], 0, out, formats=formats)
        except ModelError as error:
            if "as ONNX" not in str(error):
                raise
            row["onnx"] = f"{str(error).partition(': ')[2]} (told when the exporter trips over it; nothing is left)"
            formats.remove("onnx")
            export_tuned(domain, results["tune"], 0, out, formats=formats)
        row[train] = _exported(domain, results, found, out, order)
        row |= {kind: _READERS[kind](out, order) for kind in formats}
        if train == "projections":
            row["predict"] = _predicted(out, paths)
    return row


def _formats(domain: Domain, row: Row) -> list[Format]:
    try:
        to_transformers.check(domain.clip)
    except ModelError as error:
        why = str(error).partition(" has ")[2].partition(", which")[0]
        row["transformers"] = re.sub(r"the image tower \S+ of timm", "an image tower of timm", why)
        return ["onnx"]
    return ["onnx", "transformers"]


# --- the models and pictures ------------------------------------------------------------------------------------------


def build(family: Family, folder: Path) -> None:
    """Write the folder as open_clip's `save_pretrained` does."""
    folder.mkdir(parents=True)
    config: Any = open_clip.get_model_config(family.like)
    config |= family.rest
    vision, text = config["vision_cfg"], config["text_cfg"]
    vision |= family.vision
    text |= family.text
    if family.shrink:
        vision["timm_model_name"] = _small(vision["timm_model_name"], **family.shrink)
    if family.tower is not None:
        tower = folder.with_name("tower")
        family.tower().save_pretrained(tower)
        text |= {"hf_model_name": str(tower), "hf_tokenizer_name": str(tower), "hf_model_pretrained": False}
    if "hf_tokenizer_name" in text:
        tokenizer().save_pretrained(folder)
    is_custom = config.pop("custom_text", False) or family.tower is not None
    custom = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP
    torch.manual_seed(0)
    model = (custom if is_custom else open_clip.CLIP)(**config)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 and not name.startswith("logit"):  # zeros and ones hide mistakes
            parameter.data += 0.1 * torch.rand_like(parameter)
    save_file({name: t.contiguous().clone() for name, t in model.state_dict().items()}, folder / OPEN_CLIP_WEIGHTS)
    said = {"model_cfg": {**config, "custom_text": is_custom}, "preprocess_cfg": dict(family.preprocess)}
    (folder / OPEN_CLIP_CONFIG).write_text(json.dumps(said))


def _small(name: str, **sizes: Any) -> str:
    """A tower of timm by a name of its own, for open_clip and for us."""

    def made(pretrained: bool = False, **options: Any) -> Any:
        return timm.create_model(name, pretrained=pretrained, **sizes, **options)

    made.__name__ = f"small_{name}"
    return str(register_model(made).__name__)


def tokenizer() -> Any:
    """Byte pairs of some words, padded with 1 as RoBERTa and SigLIP do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    made: Any = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=letters)
    made.train_from_iterator([*TEXTS, *CLASSES], trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", **names)


def draw(folder: Path) -> dict[str, Path]:
    """Colourful pictures, none of them square, by file name."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(IMAGES):
        coarse = Image.fromarray(random.integers(0, 256, (7, 10, 3), np.uint8))
        coarse.resize((450 + number, 300), Image.Resampling.BICUBIC).save(folder / f"{number:02d}.png")
    return {path.name: path for path in sorted(folder.iterdir())}


def _domain(folder: Path, train: str) -> Domain:
    texts = pl.DataFrame([{"path": f"{n:02d}.png", "text": f"{TEXTS[n % 3]} {n}"} for n in range(IMAGES)])
    texts.write_csv(folder / "texts.csv")
    lr = 1e-2 if train == "projections" else 1e-4
    tune = {"train": train, "text_tower": "trainable", "epochs": 2, "batch_size": 6, "lr": lr}
    return Domain.model_validate(
        {
            "name": "zoo",
            "source": str(folder / "images"),
            "classes": CLASSES,
            "clip": {"model": str(folder / "base")},
            "describer": {"kind": "sidecar", "texts": str(folder / "texts.csv")},
            "method": ["latteclip"],
            "seeds": [0],
            "latteclip": tune,
            "store": str(folder / "store"),
            "output": str(folder / "runs"),
        }
    )


# --- by the libraries alone -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plain:
    """A folder as open_clip alone reads it."""

    folder: Path

    @functools.cached_property
    def _parts(self) -> tuple[Any, Any, Any]:
        name = f"local-dir:{self.folder}"
        model, _, preprocess = open_clip.create_model_and_transforms(name)
        return model.eval(), preprocess, open_clip.get_tokenizer(name)

    def pixels(self, paths: Sequence[Path]) -> Tensor:
        """``(n, 3, height, width)``."""
        return torch.stack([self._parts[1](Image.open(path)) for path in paths])

    def images(self, pixels: Tensor, centre: Tensor | float = 0.0) -> np.ndarray:
        """Unit features ``(n, dim)``."""
        with torch.inference_mode():
            return F.normalize(self._parts[0].encode_image(pixels, normalize=False) - centre, dim=-1).numpy()

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Unit features ``(n, dim)``."""
        with torch.inference_mode():
            return F.normalize(self._parts[0].encode_text(self._parts[2](list(texts)), normalize=False), dim=-1).numpy()


def apart(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest absolute difference."""
    return float(np.abs(ours - theirs).max())


def _names(domain: Domain, results: Mapping[str, StageResult], found: Features) -> list[str]:
    index = read_index(open_store(domain).open(results["shard train"].ref))
    names = dict(zip(index["key"], index["path"], strict=True))
    return [names[key] for key in found.keys]


def _exported(
    domain: Domain, results: Mapping[str, StageResult], found: Features, folder: Path, paths: Sequence[Path]
) -> float:
    tuned = chosen_model(domain, results["tune"], 0, None)[2]
    ours = tuned_features(domain, tuned, open_store(domain).open(results["shard train"].ref), found)
    plain, head = Plain(folder), load_file(folder / HEAD_FILE)
    of_texts = apart(text_reader(domain, tuned).text_features(TEXTS), plain.texts(TEXTS))
    return max(apart(ours, plain.images(plain.pixels(paths), head["centre"])), of_texts)


def _predicted(folder: Path, paths: Mapping[str, Path]) -> float:
    out = folder.with_name("predictions.parquet")
    predict(folder, str(next(iter(paths.values())).parent), str(out))
    told, plain, head = pl.read_parquet(out), Plain(folder), load_file(folder / HEAD_FILE)
    features = plain.images(plain.pixels([paths[path] for path in told["path"]]), head["centre"])
    temperature = json.loads((folder / SETTINGS_FILE).read_text())["temperature"]
    best = (head["scale"] / temperature * torch.from_numpy(features) @ head["prototypes"].T).softmax(1).max(1)
    assert told["class"].to_list() == [CLASSES[number] for number in best.indices.tolist()]
    return apart(told["probability"].to_numpy(), best.values.numpy())


def _by_onnx(folder: Path, paths: Sequence[Path]) -> float:
    import onnxruntime

    plain, head = Plain(folder), load_file(folder / HEAD_FILE)
    pixels = plain.pixels(paths)
    session = onnxruntime.InferenceSession(folder / ONNX_FILE, providers=["CPUExecutionProvider"])
    return apart(session.run(["features"], {"pixels": pixels.numpy()})[0], plain.images(pixels, head["centre"]))


def _by_transformers(folder: Path, paths: Sequence[Path]) -> float:
    plain = Plain(folder)
    model = transformers.CLIPModel.from_pretrained(folder / TRANSFORMERS).eval()
    reader = transformers.AutoTokenizer.from_pretrained(folder / TRANSFORMERS)
    pixels = plain.pixels(paths)
    texts = reader(TEXTS, padding="max_length", truncation=True, return_tensors="pt")
    with torch.inference_mode():
        of_images = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
        of_texts = model.text_projection(model.text_model(**texts).pooler_output)
    found = (F.normalize(embeds, dim=-1).numpy() for embeds in (of_images, of_texts))
    return max(map(apart, found, (plain.images(pixels), plain.texts(TEXTS))))


_READERS: Mapping[Format, Callable[[Path, Sequence[Path]], float]] = {
    "onnx": _by_onnx,
    "transformers": _by_transformers,
}


if __name__ == "__main__":
    main()
