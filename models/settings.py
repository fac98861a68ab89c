"""Settings of the models. Apart from the models themselves, so that reading a domain file does not load torch."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetJsonSchemaHandler,
    Tag,
    field_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError

PairPolicy = Literal["uniform", "within_group", "mixed"]
"""Which images are compared: any two, two of one pseudo-class, or half of these and half of those."""
FilterMode = Literal["compat", "recommended"]
"""Rules for texts about pairs: those of PC-CLIP's released code, or some for any language model."""

ZERO_SHOT = "zero_shot"
"""In place of a method: the model as it came."""
ZERO_SHOTS = ("zero_shot_plain", "zero_shot_centred", "zero_shot_estimated")
"""What every method is compared with: on features as they are, less the domain's mean, and less as much of it as the
images speak for (:mod:`models.judge.shift`)."""


def own_zero_shot(centre: bool | None) -> str:
    """Which of :data:`ZERO_SHOTS` a domain with this ``clip.centre`` starts from, keeps, exports and serves."""
    return {None: "zero_shot_estimated", True: "zero_shot_centred", False: "zero_shot_plain"}[centre]


class Settings(BaseModel):
    """Immutable, and a mistyped key is an error, not a silent default.

    What stands below a field describes it in the JSON schema. It is read when a schema is asked for: to find it in the
    sources of all sections takes half of the time that reading a domain file does.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        found = handler(core_schema)
        fields = handler.resolve_ref_schema(found).get("properties", {})
        for name, said in _descriptions(cls).items():
            if name in fields:
                fields[name].setdefault("description", said)
        return found


def _descriptions(kind: type[Settings]) -> dict[str, str]:
    """The docstring below each field of a class and of those it comes from."""
    import ast
    import inspect
    import textwrap

    found = {}
    for each in reversed(kind.__mro__):
        if not issubclass(each, Settings):
            continue
        try:
            source = ast.parse(textwrap.dedent(inspect.getsource(each))).body[0]
        except OSError:  # made without a source, as a domain with the sections of its methods is
            continue
        assert isinstance(source, ast.ClassDef)
        for field, below in pairwise(source.body):
            match field, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(said))):
                    found[name] = inspect.cleandoc(said)
    return found


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


class NeighbourSettings(Settings):
    """A second image tower, which is not adapted and reads no texts: it says which images are alike."""

    model: str
    """A model of timm with the name of its weights, such as timm/vit_small_patch14_dinov2.lvd142m, or what
    ``clip.model`` may be."""
    pretrained: str | None = None
    """As ``clip.pretrained``; of a timm model, if its weights are your own, the path of their .safetensors file."""
    resize: Literal["crop", "pad"] = "crop"
    """See ``clip.resize``."""


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


def kind_of(value: Any) -> Any:
    """The ``kind`` of a describer's settings, checked or not."""
    return value.get("kind", "tags") if isinstance(value, dict) else getattr(value, "kind", None)


class WordsSettings(Settings):
    """Texts about pairs without a language model: words of one description that the other lacks."""

    kind: Literal["words"] = "words"
    """Who writes the texts."""


TextModelSettings = Annotated[
    Annotated[VllmSettings, Tag("vllm")] | Annotated[OpenAISettings, Tag("openai")], Discriminator(kind_of)
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


Momentum = Annotated[float, Field(ge=0, lt=1)]


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
