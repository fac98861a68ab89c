"""Settings of the models. Apart from the models themselves, so that reading a domain file does not load torch."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator
from pydantic_core import PydanticCustomError

from models.schedule import steps_per_epoch

DEFAULT_STEPS = 640

PairPolicy = Literal["uniform", "within_group", "mixed"]
"""Which images are compared: any two, two of one pseudo-class, or half of these and half of those."""
FilterMode = Literal["compat", "recommended"]
"""Rules for texts about pairs: those of PC-CLIP's released code, or some for any language model."""

Method = Literal[
    "latteclip", "latteclip_plus", "pc_clip", "transduction", "clamp", "flyp", "wise_ft", "self_training",
    "class_descriptions",
]  # fmt: skip
"""Ways to adapt: docs/methods.md."""
ZERO_SHOT = "zero_shot"
"""In place of a method: the model as it came."""
ZERO_SHOTS = ("zero_shot_plain", "zero_shot_centred", "zero_shot_estimated")
"""What every method is compared with: on features as they are, less the domain's mean, and less as much of it as the
images speak for (:mod:`models.judge.shift`)."""


def own_zero_shot(centre: bool | None) -> str:
    """Which of :data:`ZERO_SHOTS` a domain with this ``clip.centre`` starts from, keeps, exports and serves."""
    return {None: "zero_shot_estimated", True: "zero_shot_centred", False: "zero_shot_plain"}[centre]


NAMES = {
    "zero_shot_plain": "plain zero-shot",
    "zero_shot_centred": "domain-centred zero-shot",
    "zero_shot_estimated": "estimated zero-shot",
    "latteclip": "LatteCLIP",
    "latteclip_plus": "LatteCLIP plus",
    "pc_clip": "PC-CLIP",
    "transduction": "anchored transduction",
    "clamp": "CLAMP",
    "class_descriptions": "zero-shot with class descriptions",
    "flyp": "FLYP",
    "wise_ft": "FLYP averaged with zero-shot",
    "self_training": "self-training",
}
"""Methods and zero-shots for people."""
SEEDLESS: frozenset[Method] = frozenset({"transduction", "class_descriptions"})
"""Methods without random numbers."""
READS_TEXTS: frozenset[Method] = frozenset({"latteclip", "latteclip_plus"})
"""Methods that use features of the texts of images and groups."""
READS_PAIRS: frozenset[Method] = frozenset({"pc_clip"})
"""Methods that use texts about pairs of images."""


class Settings(BaseModel):
    """Immutable, and a mistyped key is an error, not a silent default."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def one_or_many(value: Any) -> Any:
    """For a field that takes a list: one text alone is a list of one."""
    return [value] if isinstance(value, str) else value


def grey_range(value: Any) -> Any:
    """Checks a :data:`GreyRange`; raises ValueError where it is none."""
    if isinstance(value, list | tuple) and len(value) == 2:
        low, high = value
        numbers = all(isinstance(each, int | float) and math.isfinite(each) for each in value)
        if numbers and not isinstance(low, bool) and low < high:
            return float(low), float(high)
    elif value in ("auto", "full"):
        return value
    raise PydanticCustomError("grey_range", "is neither auto nor full nor [low, high] with low below high")


GreyRange = Annotated[Literal["auto", "full"] | tuple[float, float], BeforeValidator(grey_range)]
"""Which values of greys of more than 8 bits are black and white. auto: as the file says, else those of the type. full:
those of the type, whatever the file says. Else these two."""


class ClipSettings(Settings):
    """Which CLIP is adapted."""

    model: str = "embedded"
    """``embedded`` (ships with packages, no download), an open_clip name such as ViT-B-32, or the path of an
    open_clip folder."""
    pretrained: str | None = None
    """open_clip's tag of the weights, for example laion2b_s34b_b79k, or the path of a file with them."""
    resize: Literal["crop", "pad"] = "crop"
    """crop: short side, then centre crop (photos). pad: to a square on white (icons, cut-outs)."""
    centre: bool | None = None
    """Subtract the domain's mean image embedding before normalising. Default: as much of it as the images speak for."""


class TagsSettings(Settings):
    """Zero-shot tags of the CLIP itself; no language model."""

    kind: Literal["tags"] = "tags"
    """Who writes the texts."""


class SidecarSettings(Settings):
    """Texts that came with the images."""

    kind: Literal["sidecar"]
    """Who writes the texts."""
    texts: str
    """CSV or Parquet with columns ``path`` and ``text``, or a folder with one .txt for each image."""


class LanguageModelSettings(Settings):
    """What is asked of a multimodal model, wherever it runs."""

    model: str
    """Name on the model hub or of the server, or the path of a model folder."""
    revision: str | None = None
    """Commit or tag of the weights. Texts of different revisions never mix."""
    prompts: str = "generic"
    """Prompt pack: one that ships (docs/describers.md lists them), or the path of a YAML file."""
    max_tokens: int = Field(default=77, ge=1, le=8192)
    """Length of an answer, in tokens of the model; LatteCLIP has 77."""
    temperature: float = Field(default=0.0, ge=0, le=2)
    """0 gives the likeliest answer, and the same one every time."""
    structured: bool = False
    """Constrain answers to JSON, for models that chat around their answer. Costs about half of the speed."""
    longest_px: int = Field(default=1024, ge=32, le=8192)
    """Images are made smaller to have no longer side."""
    extra: dict[str, Any] = {}
    """Further arguments of ``vllm.LLM``, such as ``quantization``, or further fields of a server's requests, such as
    ``top_p``; a field that is null is not sent. All are part of the texts' identity."""

    @property
    def sampling(self) -> dict[str, Any]:
        """All that shapes a text besides model and prompt."""
        found = self.model_dump(include={"max_tokens", "temperature", "structured", "longest_px"})
        return {**found, **({"extra": self.extra} if self.extra else {})}


class VllmSettings(LanguageModelSettings):
    """vLLM in the worker's own process. What is not about the texts has no part in their identity."""

    kind: Literal["vllm"]
    """Who writes the texts."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Arithmetic. auto: what the weights are stored in."""
    max_context: int | None = Field(default=None, ge=64)
    """Tokens of prompt, images and answer together. Default: what the model has; less takes less memory."""
    max_batch: int = Field(default=256, ge=1)
    """Prompts that are answered at the same time."""
    max_images: int = Field(default=4, ge=1, le=64)
    """Images in one prompt."""
    gpu_memory: float = Field(default=0.9, gt=0, le=1)
    """Share of the GPU's memory that vLLM may take."""
    tensor_parallel: int = Field(default=1, ge=1)
    """GPUs that one model is spread over."""
    trust_remote_code: bool = False
    """Run Python code that comes with the weights. Only for models you have read."""

    @property
    def sampling(self) -> dict[str, Any]:
        """As of any language model, and the arithmetic."""
        return {**super().sampling, "dtype": self.dtype}


class OpenAISettings(LanguageModelSettings):
    """Any server that speaks OpenAI's chat API: vllm serve, SGLang, llama-server, a hosted one."""

    kind: Literal["openai"]
    """Who writes the texts."""
    url: str
    """Base address, for example http://127.0.0.1:8000/v1."""
    key_env: str = "OPENAI_API_KEY"
    """Environment variable with the key; a server without keys needs none."""
    key_block: str | None = None
    """Name of a Prefect Secret block with the key, instead of the variable."""
    concurrency: int = Field(default=32, ge=1, le=1024)
    """Requests under way at a time."""
    timeout_s: float = Field(default=120.0, gt=0)
    """Seconds until a request counts as failed."""
    patience_s: float = Field(default=120.0, ge=0)
    """Seconds of failures without a single answer until the run stops, retrying meanwhile."""

    @field_validator("url")
    @classmethod
    def _is_an_address(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
            is_good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            is_good = False
        if not is_good:
            raise PydanticCustomError("url", "is no address of a server, such as http://127.0.0.1:8000/v1")
        return url


def _kind(value: Any) -> Any:
    return value.get("kind", "tags") if isinstance(value, dict) else getattr(value, "kind", None)


DescriberSettings = Annotated[
    Annotated[TagsSettings, Tag("tags")]
    | Annotated[SidecarSettings, Tag("sidecar")]
    | Annotated[VllmSettings, Tag("vllm")]
    | Annotated[OpenAISettings, Tag("openai")],
    Discriminator(_kind),
]
"""Who writes the texts: ``kind`` is tags, sidecar, vllm or openai."""


class WordsSettings(Settings):
    """Texts about pairs without a language model: words of one description that the other lacks."""

    kind: Literal["words"] = "words"
    """Who writes the texts."""


TextModelSettings = Annotated[
    Annotated[VllmSettings, Tag("vllm")] | Annotated[OpenAISettings, Tag("openai")], Discriminator(_kind)
]
"""A language model: ``kind`` is vllm or openai."""


class PairSettings(Settings):
    """Texts about how one image differs from another, which `pc_clip` learns from."""

    budget: int = Field(default=20_000, ge=1, le=10_000_000)
    """Pairs at most; fewer where there are no more."""
    policy: PairPolicy = "mixed"
    """uniform: any two images, as in the paper. within_group: two of one pseudo-class, which is harder. mixed: half of
    these, half of those. Images with the same text are never compared."""
    both_directions: bool = False
    """Ask about each pair in both orders: twice the texts, half of the pairs for the same budget."""
    class_pairs: int = Field(default=0, ge=0)
    """So many pairs of classes, those that the untouched CLIP confuses most, get texts about their difference in both
    orders, and pc_clip's classifier is corrected by them: comparative prompting. 0: it is not."""
    filter: FilterMode = "recommended"
    """Which answers are not used: docs/methods.md has the rules. compat is the paper's, for English."""
    seed: int = 0
    """Of the draws."""
    describer: TextModelSettings | None = None
    """A language model that writes the texts; it sees the descriptions, no image. Default: `describer`, where that is
    one; else a rule that says which words one description has and the other lacks."""


class PcClipSettings(Settings):
    """PC-CLIP: the text tower learns to say how two images differ. The image tower stays as it is."""

    train: Literal["blocks", "last_blocks", "projection"] | None = None
    """What learns. blocks: the blocks of the text tower, as in the paper. last_blocks: the last `n_blocks` of them.
    projection: a linear map at the end of the text tower, on cached features, in a minute or two on a laptop. Default:
    projection for the embedded model, else blocks."""
    n_blocks: int = Field(default=2, ge=1)
    """Blocks that `last_blocks` trains."""
    loss: Literal["contrastive", "squared_error"] = "contrastive"
    """Of texts and differences; the squared error is the paper's variant."""
    temperature: float = Field(default=1.0, gt=0, le=100)
    """Of the contrastive loss; fixed."""
    epochs: int = Field(default=20, ge=1)
    """Passes over the pairs."""
    batch_size: int = Field(default=512, ge=2)
    """Pairs in a step."""
    decay: float = Field(default=0.9, gt=0, le=1)
    """Factor of the learning rate after each epoch."""
    lr: float | None = Field(default=None, ge=0)
    """Learning rate of the first epoch. Default: what moves a weight as far in all as the paper's run does, whatever
    the number of pairs; for `projection` ten times as far, as there is one layer in place of twelve blocks."""
    averaging: float = Field(default=1.0, gt=0, le=1)
    """Share of the tuned weights in the result; the rest are those of the untouched CLIP. 1: all of it is tuned."""


OF_TEXTS = {
    "alpha", "labels", "use_class_texts", "use_image_texts", "use_group_texts", "mixer_axis", "zero_shot_class_weight",
    "mixer_prototypes", "texts_from",
}  # fmt: skip
"""LatteCLIP's settings that no baseline has: what its targets are made of."""
Momentum = Annotated[float, Field(ge=0, lt=1)]


class LatteClipSettings(Settings):
    """Every choice LatteCLIP leaves. Where a default is not the paper's, its text says what the paper has."""

    train: Literal["prototypes", "projections", "last_blocks", "all"] = "projections"
    """What the loss trains besides the prototypes. prototypes: nothing. projections: a linear map at the end of each
    tower, on cached features. last_blocks: each tower's last `n_blocks` and projection. all: as in the paper."""
    text_tower: Literal["trainable", "frozen"] | None = None
    """Whether the text side learns as well; its gradient is `alpha` times the image side's. Default: frozen for
    projections (a text map learns by heart what the image map should), else trainable, as in the paper."""
    n_blocks: int = Field(default=2, ge=1)
    """Blocks of each tower that `last_blocks` trains."""
    alpha: float = Field(default=0.01, ge=0, le=1)
    """Share of the texts in a target, and so how far a prototype moves per step."""
    texts_from: Literal["clip", "pc_clip", "clamp"] = "clip"
    """Who reads the texts: the untouched CLIP, or the text tower that pc_clip or clamp trained with the same seed,
    which then has to be in `method` as well."""
    labels: Literal["both", "zero_shot", "tuned"] = "both"
    """Pseudo-labels in use: those of the untouched CLIP, those of the nearest prototype, or both."""
    use_class_texts: bool = True
    """Class descriptions enter the mixer."""
    use_image_texts: bool = True
    """Image descriptions enter the mixer."""
    use_group_texts: bool = True
    """Group descriptions enter the mixer."""
    mixer_axis: Literal["row", "column"] = "row"
    """What the mixer's class weight runs along: samples, or, as in the released code, features (batch_size = width)."""
    zero_shot_class_weight: Literal["own", "shared"] = "own"
    """Class weight of the zero-shot branch: its own, or, as in the released code, the tuned branch's."""
    mixer_prototypes: Literal["epoch", "live"] = "epoch"
    """Prototypes that the mixer's weights are measured on: those at the epoch's start, or the latest."""
    batch_size: int = Field(default=128, ge=1)
    """Images per step; the paper has 512."""
    sampling: Literal["with_replacement", "without_replacement"] = "without_replacement"
    """without_replacement: each image once per epoch. with_replacement: full batches with repeats, as in the paper."""
    step_multiple: int = Field(default=1, ge=1)
    """Steps of an epoch are rounded up to a multiple of this; the paper's are of its loader's 3 or 4 workers."""
    epochs: int | None = Field(default=None, ge=1)
    """Passes over the images. Default: as few as make 640 steps, like the paper's 585 to 2115: by then texts have
    replaced all but `(1 - alpha) ** steps`, 0.2 percent, of the first prototypes."""
    scale: float | None = Field(default=None, gt=0, le=100)
    """Where the loss's `exp(logit_scale)` starts. Default: 10 for projections, else the CLIP's own. At a low scale no
    image is ever settled, so that wrong pseudo-labels average out where a high one would learn them by heart."""
    lr: float | None = Field(default=None, ge=0)
    """Highest learning rate. Default: 1e-5 for projections, else the paper's 1e-7."""
    warmup: int = Field(default=10, ge=0)
    """Steps of linear warm-up; the paper has about one epoch."""
    weight_decay: float = Field(default=0.2, ge=0)
    """AdamW's decay of matrices. Vectors and the scale have none."""
    betas: tuple[Momentum, Momentum] = (0.9, 0.98)
    """AdamW's averaging factors."""
    eps: float = Field(default=1e-6, gt=0)
    """AdamW's epsilon."""
    augment: bool = True
    """Train on augmented views; only where pixels are used."""

    @property
    def peak_lr(self) -> float:
        """The highest learning rate of a run."""
        if self.train == "prototypes":
            return 0.0
        return self.lr if self.lr is not None else 1e-5 if self.train == "projections" else 1e-7

    def n_epochs(self, n_images: int) -> int:
        """Epochs of a run over so many images."""
        return self.epochs or math.ceil(DEFAULT_STEPS / self.n_steps(n_images))

    def n_steps(self, n_images: int) -> int:
        """Steps of an epoch over so many images."""
        return steps_per_epoch(n_images, self.batch_size, self.step_multiple)

    def first_scale(self, clip_scale: float) -> float:
        """The loss's scale at the start of a run with a CLIP of that scale."""
        return self.scale or (10.0 if self.train == "projections" else clip_scale)

    @property
    def trains_texts(self) -> bool:
        """Whether the text side learns."""
        default = "frozen" if self.train == "projections" else "trainable"
        return self.train != "prototypes" and (self.text_tower or default) == "trainable"

    @property
    def trains_towers(self) -> bool:
        """Whether images and texts go through the towers at every step."""
        return self.train in ("last_blocks", "all")

    @model_validator(mode="after")
    def _has_text(self) -> LatteClipSettings:
        if not (self.use_class_texts or self.use_image_texts or self.use_group_texts):
            raise ValueError("the mixer has no text: turn on use_class_texts, use_image_texts or use_group_texts")
        return self


class TrainingSettings(Settings):
    """How models are trained, whatever the method."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic inside trained towers. Parameters, margins, pseudo-labels and losses are always float32."""
    micro_batch: int | None = Field(default=None, ge=1)
    """Rows that a tower holds at a time, for batches that do not fit the memory: the same gradients for one more pass
    forward. Default: the whole batch."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Give the exponential moving average of the parameters, with this factor per step, in place of the last ones."""
    processes: int = Field(default=1, ge=1)
    """Processes that share each batch, each on a GPU of its own where there are any."""
    checkpoint_s: float = Field(default=60.0, ge=0)
    """Seconds between checkpoints, from which a killed run goes on."""
    tensorboard: bool = False
    """Write every step's numbers for TensorBoard to OUTPUT/<name>/tensorboard. Needs the extra of that name."""


NOT_OF_THE_MODEL = {"checkpoint_s", "tensorboard", "processes"}
"""Training settings that a model does not depend on."""


Language = Literal[
    "any", "en", "de", "fr", "es", "it", "pt", "nl", "ru", "uk", "el", "ar", "fa", "he", "hi", "bn", "th", "zh",
    "ja", "ko",
]  # fmt: skip


class ScreenSettings(Settings):
    """When a text is doubted. What a flag does to a text's weight is in docs/screening.md."""

    language: Language = "en"
    """The language that the CLIP reads: texts in another count half. A guess by script and common words; any: not
    looked at."""
    clip_margin: float = Field(default=2.0, ge=0)
    """A text is dropped if it fits its own image no better than other images, and worse than usual: by so many
    standard deviations below the median of all texts. Higher drops fewer."""
    identical: float = Field(default=0.01, gt=0, le=1)
    """A text that stands at more than this share of the images, and at five at least, is flagged and counts half."""
    floor: int = Field(default=3, ge=1)
    """Texts that a pseudo-class keeps, at a small weight, where screening would leave it none."""


class TransductionSettings(Settings):
    """Anchored transduction, by itself and in latteclip_plus (docs/methods.md)."""

    neighbours: int = Field(default=8, ge=1)
    """Nearest images that an image's text beliefs travel from."""
    spread: float = Field(default=0.5, ge=0, lt=1)
    """How much of an image's beliefs is its neighbours', who have most of theirs from their own neighbours. 0: none."""
    shrinkage: float = Field(default=0.03, gt=0)
    """Added to the covariance, in units of its largest eigenvalue. Large values make the mixture spherical."""
    anchor: float = Field(default=20.0, gt=0)
    """How many images at its text's place each class's mean begins with: what holds classes with few images."""
    max_steps: int = Field(default=30, ge=1)
    """Rounds of means and assignments at most."""
    tolerance: float = Field(default=1e-4, ge=0)
    """The rounds end when fewer than this share of the assignments moves."""


class ClampSettings(Settings):
    """CLAMP: a language model as the text tower. Defaults that are not the paper's are for small models and runs."""

    lm: str | None = None
    """``embedded`` (Gemma 3 270M from packages; see docs/methods.md for its terms), the name of a causal language model
    on the model hub, or the path of a model folder. There is no default."""
    revision: str | None = None
    """Commit or tag of the weights."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Arithmetic of the language model; what is learned is always float32."""
    prompts: int = Field(default=24, ge=1, le=256)
    """Learned vectors after each text."""
    prompt_mask: Literal["bidirectional", "causal", "isolated"] = "bidirectional"
    """What a prompt sees besides the text: all prompts, as in the paper; those up to itself; none."""
    pool_heads: int = Field(default=8, ge=1)
    """Attention heads of the pool; they divide the CLIP's width."""
    wrapper: Literal["attributes", "single"] = "attributes"
    """The sentence around a text: the paper's, which has it twice, or one that has it once, for long descriptions."""
    max_tokens: int = Field(default=48, ge=1)
    """Tokens of a text that are read; longer ones are cut."""
    lora_rank: int = Field(default=0, ge=0)
    """Rank of the updates of the language model's attention; the paper has 16. 0: the language model stays as it is,
    its reading of each text is kept, and training is several times faster."""
    lora_alpha: int = Field(default=16, ge=1)
    """The updates count `alpha / rank` times."""
    lora_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of an update's inputs that a step of training leaves out."""
    lora_targets: list[str] = Field(default=["q_proj", "k_proj", "v_proj", "o_proj"], min_length=1)
    """Names of the matrices with updates."""
    distill: float = Field(default=1.0, ge=0)
    """Weight of the distillation from the CLIP's own text tower; the contrastive loss has 1."""
    distill_scale: Literal["teacher", "native"] = "teacher"
    """On the student's similarities in the distillation: the teacher's logit scale, or its own, as in open_clip."""
    reduction: Literal["mean", "sum"] = "mean"
    """Losses as means over the batch and the two directions, or sums as the paper writes them."""
    group_share: float = Field(default=0.3, ge=0, le=1)
    """How often an image's text is that of a group it is in."""
    class_share: float = Field(default=0.2, ge=0, le=1)
    """How often it is the class of the image's zero-shot pseudo-label, by its name."""
    batch_size: int = Field(default=256, ge=2)
    """Pairs in a step; a pair is learned from the others of its batch."""
    steps: int = Field(default=1000, ge=1)
    """Steps of a run."""
    pool_steps: int = Field(default=0, ge=0)
    """Steps before these in which the pool alone learns, from states at the first prompts: each text goes through the
    language model once, so they cost next to nothing. The paper has none."""
    lr: float = Field(default=5e-4, ge=0)
    """Highest learning rate of prompts and pool."""
    lora_lr: float = Field(default=1e-4, ge=0)
    """Highest learning rate of LoRA."""
    warmup: float = Field(default=0.02, ge=0, le=1)
    """Share of the steps with a rising learning rate."""
    weight_decay: float = Field(default=0.1, ge=0)
    """AdamW's decay of matrices. Prompts, query, norms, biases and the scale have none."""
    betas: tuple[Momentum, Momentum] = (0.9, 0.98)
    """AdamW's averaging factors."""
    eps: float = Field(default=1e-6, gt=0)
    """AdamW's epsilon."""
    clip_norm: float = Field(default=1.0, gt=0)
    """Longest gradient; longer ones are scaled down."""
    cache_gb: float = Field(default=2.0, ge=0)
    """Memory for what the language model made of texts, without LoRA. Texts beyond it are read again at each step."""
