"""The domain file: one YAML that says what to adapt to, checked as a whole before anything runs."""

from __future__ import annotations

import difflib
import functools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model, model_validator
from pydantic_core import PydanticCustomError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from latteflow.models.errors import ModelError
from latteflow.models.methods.latteclip import LatteClipSettings
from latteflow.models.methods.method import Method, S, Sections
from latteflow.models.methods.registry import METHODS, SECTIONS, readers
from latteflow.models.settings import (
    ClipSettings,
    GreyRange,
    LanguageModelSettings,
    NeighbourSettings,
    PairSettings,
    ScreenSettings,
    Settings,
    TagsSettings,
    TrainingSettings,
    VllmSettings,
    WordsSettings,
    one_or_many,
)
from latteflow.models.texts import prompts
from latteflow.models.texts.describers.registry import KINDS, DescriberSettings
from latteflow.tasks.core.errors import ConfigError

OneOrMore = Annotated[
    list[str], Field(min_length=1), BeforeValidator(one_or_many, json_schema_input_type=str | list[str])
]


class Classes(Settings):
    """The names of some classes, and the sentences that they stand in."""

    classes: list[str]
    """Names, or the path of a text file with one on each line."""
    templates: OneOrMore = Field(default=["a photo of a {}."])
    """Sentences with one {} for the class name."""

    @model_validator(mode="after")
    def _classes_are_distinct_names(self) -> Self:
        if len(self.classes) < 2:
            raise PydanticCustomError(
                "classes",
                f"`classes`: {len(self.classes)} given, at least 2 are needed: the names of what the images may "
                "show, as in [robin, wren]",
            )
        empty = [index for index, name in enumerate(self.classes) if not name.strip()]
        if empty:
            raise PydanticCustomError("classes", f"`classes`: number {empty[0] + 1} is empty")
        counts = Counter(self.prompt_names)
        twice = [name for name in self.classes if counts[self.prompt_name(name)] > 1]
        if twice:
            raise PydanticCustomError(
                "classes", f"`classes`: {', '.join(map(repr, twice))} say the same thing; keep one, or tell them apart"
            )
        return self

    @model_validator(mode="after")
    def _templates_have_one_gap(self) -> Self:
        for template in self.templates:
            if template.count("{}") != 1:
                raise PydanticCustomError(
                    "templates", f"`templates`: {template!r} needs exactly one {{}} for the class name"
                )
        return self

    @staticmethod
    def prompt_name(name: str) -> str:
        """The class name as it stands in a sentence: lower case (tokenizers fold it anyway), underscores as spaces."""
        return " ".join(name.replace("_", " ").lower().split())

    @property
    def prompt_names(self) -> list[str]:
        """The classes as they stand in sentences."""
        return [self.prompt_name(name) for name in self.classes]

    def prompts(self) -> list[list[str]]:
        """For each class, its sentences."""
        return [[template.replace("{}", name) for template in self.templates] for name in self.prompt_names]


class GeneralSettings(Classes):
    """Images of another kind, with labels: what adapting to the domain made the model forget."""

    source: OneOrMore
    """Images of these classes."""
    labels: str
    """CSV or Parquet with columns ``path`` and ``class``."""


class EvaluationSettings(Settings):
    """What only `evaluate` reads."""

    labels: str
    """CSV or Parquet with columns ``path`` and ``class``; paths relative to this file's folder."""
    source: OneOrMore | None = None
    """Images that nothing was tuned on. Default: the training images themselves (transductive)."""
    few_labels: bool = False
    """Whether to learn from a few of the labels too, on the side, to say how many the adaptation is worth."""
    general: GeneralSettings | None = None
    """What the adapted towers are tried on as well, before and after."""


class GroupSettings(Settings):
    """Texts about look-alikes."""

    size: int = Field(default=4, ge=2, le=16)
    """Images in a group, all with the same pseudo-label (LatteCLIP uses 4)."""
    view: Literal["collage", "images"] = "collage"
    """How a multimodal model sees a group: as one picture, as in LatteCLIP, or as several images."""


class ShardSettings(Settings):
    """How images are packed, and which are refused."""

    images: int = Field(default=1000, ge=1, le=100_000)
    """Images in a shard: the unit of work and of resume."""
    max_pixels: int = Field(default=100_000_000, ge=1)
    """Larger images are quarantined before they are decoded."""
    max_aspect: float = Field(default=100.0, ge=1)
    """Images longer than this many times their shorter side are quarantined."""
    max_megabytes: int = Field(default=128, ge=1, le=2048)
    """Larger files are not read."""
    drop_duplicates: bool = False
    """Of training images with the same bytes only the first is used; all are recorded either way."""
    grey_range: GreyRange = "auto"
    """Greys of more than 8 bits, as of microscopes and X-ray detectors: which values are black and white. auto: as the
    file says, else 0 and what its type holds. full: the latter always. [low, high]: these values."""
    image_column: str | None = None
    """For Parquet files and saved data sets: the column with the images, where several could be meant."""


class EmbedSettings(Settings):
    """How features are computed; does not change them."""

    batch: int = Field(default=64, ge=1, le=4096)
    """Images in one forward pass."""


class WorkerSettings(Settings):
    """Which work of a run under Prefect goes to other work pools. `latteflow run` does all of it itself."""

    texts: int = Field(default=50_000, ge=1)
    """Texts that one run on the pool `gpu` writes, about: it takes whole shards. Each run starts an engine, so give it
    minutes of work."""
    images: int | None = Field(default=None, ge=1)
    """Images that one run on the pool `train` embeds, about: it takes whole shards, and loads the model first. Default:
    no pool, the run of the domain embeds them itself."""
    runs: int = Field(default=32, ge=1, le=200)
    """Runs of a pool that wait or work at once. How many really work is up to the workers of the pool."""
    attempts: int = Field(default=3, ge=1)
    """How often a range of shards is begun before the whole run fails."""
    train: bool = False
    """Whether models are trained on the pool `train`."""


class PriceSettings(Settings):
    """What `plan` reckons with. Measured figures take the place of the estimates as soon as there are some."""

    currency: str = "USD"
    """As it is printed."""
    gpu_hour: float | None = Field(default=None, ge=0)
    """For one hour of the describer's engine, if you pay by the hour."""
    million_prompt_tokens: float | None = Field(default=None, ge=0)
    """For a million tokens of prompts and images, if you pay by the token."""
    million_output_tokens: float | None = Field(default=None, ge=0)
    """For a million tokens of answers, if you pay by the token."""
    prompt_tokens: float | None = Field(default=None, ge=0)
    """Estimate for one text, until one was written."""
    output_tokens: float | None = Field(default=None, ge=0)
    """Estimate for one text, until one was written. Default: `describer.max_tokens`."""
    texts_per_second: float | None = Field(default=None, gt=0)
    """Estimate, until a run was timed."""


_CONFIGS = ("open_clip_config.json", "latteflow_embedded.json", "config.json")
"""A folder beside the domain file is a model where it holds one of these: names of models may be names of folders."""


if TYPE_CHECKING:
    MethodName = str
else:
    MethodName = Literal[tuple(METHODS)]


class _Domain(Classes):
    """One image domain: its images, its classes, and how to adapt to it. Name, source and classes are required."""

    model_config = ConfigDict(defer_build=True)  # what is validated is `Domain`, below

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")
    """Lower-case letters, digits, - and _; names the folder of the results."""
    source: OneOrMore
    """Folder(s), file(s) or fsspec URL(s) with the unlabelled images: see docs/sources.md."""
    evaluation: EvaluationSettings | None = None
    """Labels for evaluation; nothing that trains ever sees them."""
    clip: ClipSettings = ClipSettings()
    neighbours: NeighbourSettings | None = None
    """Of transduction and latteclip_plus: which images are alike. Default: those that are alike to the CLIP."""
    describer: DescriberSettings = TagsSettings()
    """Who writes the texts: `kind` says which settings it has."""
    method: Annotated[
        list[MethodName],
        Field(min_length=1),
        BeforeValidator(one_or_many, json_schema_input_type=MethodName | list[MethodName]),
    ] = Field(default=["latteclip_plus"])
    """Ways to adapt, as the report lists them; it looks closely at the first. Default: latteclip_plus, or latteclip
    where `latteclip.train` says that towers are trained."""
    training: TrainingSettings = TrainingSettings()
    """Of every method that trains."""
    seeds: list[int] = Field(default=[0, 1, 2], min_length=1)
    """One adapted model of each method for each; figures are means over them."""
    shard: ShardSettings = ShardSettings()
    embed: EmbedSettings = EmbedSettings()
    group: GroupSettings = GroupSettings()
    screen: ScreenSettings = ScreenSettings()
    pairs: PairSettings = PairSettings()
    """Of pc_clip: what it learns from."""
    prices: PriceSettings = PriceSettings()
    workers: WorkerSettings | None = None
    """Of runs under Prefect: other machines that write the texts. Default: the run's own process does."""
    store: str = "runs/store"
    """Where artifacts live: a folder or any fsspec URL with atomic create (s3, gs, abfs)."""
    single_writer: bool = False
    """Accept a store without atomic create; only for one process at a time."""
    output: str = "runs"
    """Local folder for what people read: OUTPUT/<name>/report.html and metrics.json."""

    @model_validator(mode="after")
    def _questions_can_be_asked(self) -> Self:
        shown = self.group.size if self.group.view == "images" else 1
        if self.prompt_pack and isinstance(self.describer, VllmSettings) and shown > self.describer.max_images:
            raise PydanticCustomError(
                "describer",
                f"`group.view: images` shows {shown} images in one prompt (`group.size`), and `describer.max_images` "
                f"is {self.describer.max_images}; raise it, or use `view: collage`",
            )
        return self

    @model_validator(mode="after")
    def _questions_about_pairs_can_be_read(self) -> Self:
        try:
            _ = self.of_pairs().prompt_pack
        except PydanticCustomError as error:  # of `pairs.describer`: the other was looked at before
            why = error.message().removeprefix("`")
            raise PydanticCustomError("prompts", "`pairs.{why}", {"why": why}) from error
        return self

    @model_validator(mode="before")
    @classmethod
    def _default_method_trains_what_is_asked(cls, raw: Any) -> Any:
        section = raw.get("latteclip") if isinstance(raw, dict) and "method" not in raw else None
        train = section.get("train") if isinstance(section, dict) else getattr(section, "train", None)
        return {**raw, "method": ["latteclip"]} if train in ("last_blocks", "all") else raw

    @model_validator(mode="after")
    def _methods_can_run(self) -> Self:
        twice = [name for name, count in Counter(self.method).items() if count > 1]
        if twice:
            raise PydanticCustomError("method", f"`method`: {twice[0]} is named more than once")
        latteclip = self.of(LatteClipSettings)
        reader = latteclip.texts_from
        if reader != "clip" and not any(method.reads == "texts" for method in self.methods):
            raise PydanticCustomError(
                "method", f"`latteclip.texts_from: {reader}`: no method reads texts; add latteclip to `method`"
            )
        if reader != "clip" and reader not in self.method:
            raise PydanticCustomError(
                "method",
                f"`latteclip.texts_from: {reader}`: add {reader} to `method`, so that there is such a text tower",
            )
        if reader != "clip" and METHODS[reader].adapter and latteclip.trains_towers and latteclip.trains_texts:
            raise PydanticCustomError(
                "method",
                f"`latteclip.texts_from: {reader}`: the language model's texts cannot be trained on; add "
                "`latteclip: {text_tower: frozen}`",
            )
        for method in self.methods:
            if mistake := method.mistake(self.sections):
                raise PydanticCustomError("method", "`method`: {mistake}", {"mistake": mistake})
            if method.reads == "class_texts" and not (self.prompt_pack and self.prompt_pack.classes):
                raise PydanticCustomError(
                    "method",
                    f"`method`: {method.name} needs a language model that is asked about classes: `describer: {{kind: "
                    "vllm}` or `{kind: openai}`, with a prompt pack that has `classes`, as `generic`",
                )
        frozen = [method.name for method in self.methods if method.works_on_features]
        if frozen and latteclip.trains_towers:
            raise PydanticCustomError(
                "method",
                f"`method`: {' and '.join(frozen)} works on cached features, and `latteclip.train` is "
                f"{latteclip.train}; use `train: projections`, or leave the method out",
            )
        return self

    @property
    def general(self) -> Self | None:
        """The images of `evaluation.general` under the settings of this domain; None without any."""
        own = self.evaluation.general if self.evaluation else None
        if own is None:
            return None
        return self.model_copy(
            update={
                "source": own.source,
                "classes": own.classes,
                "templates": own.templates,
                "evaluation": EvaluationSettings(labels=own.labels),
            }
        )

    def of_split(self, split: str) -> Self:
        """With the classes of the images of a split."""
        return (self.general if split == "general" else None) or self

    def of(self, kind: type[S]) -> S:
        """The section with a method's settings."""
        return self.sections.of(kind)

    @property
    def sections(self) -> Sections:
        """Settings of the methods."""
        return Sections(*(getattr(self, name) for name in SECTIONS))

    @property
    def methods(self) -> list[Method]:
        """What is known of the methods that `method` names."""
        return [METHODS[name] for name in self.method]

    @property
    def compares(self) -> bool:
        """Whether a method needs texts about pairs."""
        return any(method.reads == "pairs" for method in self.methods)

    def seeds_of(self, method: str) -> list[int | None]:
        """One for each model of a method; None for a method without random numbers."""
        return list(self.seeds) if METHODS[method].is_seeded else [None]

    @functools.cached_property
    def prompt_pack(self) -> prompts.PromptPack | None:
        """The questions to a language model; None for a describer without one."""
        if not isinstance(self.describer, LanguageModelSettings):
            return None
        try:
            return prompts.load(self.describer.prompts)
        except ModelError as error:
            raise PydanticCustomError("prompts", "`describer.prompts`: {why}", {"why": str(error)}) from error

    def of_pairs(self) -> Self:
        """This domain with whoever writes the texts about pairs as its describer."""
        own = self.pairs.describer or self.describer
        writer = own if isinstance(own, LanguageModelSettings) else WordsSettings()
        found = self.model_copy(update={"describer": writer})
        found.__dict__.pop("prompt_pack", None)  # it was of the other describer
        return found

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a domain file.

        Raises:
            ConfigError: listing every mistake with its line, and what was probably meant.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            near = difflib.get_close_matches(path.name, [each.name for each in path.parent.glob("*.y*ml")], 1)
            hint = f"; did you mean {path.parent / near[0]}?" if near else ""
            raise ConfigError(f"domain file {path} cannot be read: {error}{hint}") from error
        try:
            raw = YAML(typ="rt").load(text)
        except YAMLError as error:
            raise ConfigError(f"domain file {path} is not valid YAML: {error}") from error
        if not isinstance(raw, Mapping):
            raise ConfigError(
                f"domain file {path}: expected `name:`, `source:` and `classes:`, found {type(raw).__name__}"
            )
        plain = _plain(raw)
        try:
            _resolve(plain, path.parent.resolve())
            return cls.model_validate(plain)
        except (ValidationError, PydanticCustomError) as error:
            mistakes: Sequence[Mapping[str, Any]] = (
                error.errors()
                if isinstance(error, ValidationError)
                else [{"loc": (), "type": error.type, "msg": error.message()}]
            )
            lines = [_explain(each, raw) for each in mistakes]
            raise ConfigError("\n".join([f"domain file {path} has {len(lines)} mistake(s):", *lines])) from error


def _section_of(name: str, kind: type[Settings]) -> tuple[type[Settings], Any]:
    who = ", ".join(method.name for method in readers(name))
    if name in _Domain.model_fields or hasattr(_Domain, name):
        raise ModelError(f"method {who}: its section cannot be called {name!r}, which a domain has already")
    return kind, Field(default=kind(), description=f"Of {who}.")


if TYPE_CHECKING:
    Domain = _Domain
else:
    Domain = create_model(
        "Domain",
        __base__=_Domain,
        __module__=__name__,
        __doc__=_Domain.__doc__,
        **{name: _section_of(name, kind) for name, kind in SECTIONS.items()},
    )


def at_home(path: str) -> Path:
    """A path with ~ as the home that it stands for; as it is where nobody has that name."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(each) for each in value]
    if isinstance(value, bool) or value is None:
        return value
    for kind in (int, float, str):  # ruamel's scalars remember their formatting; settings should not
        if isinstance(value, kind):
            return kind(value)
    return value


def _resolve(raw: dict[str, Any], folder: Path) -> None:
    """Make paths of the file absolute, relative to the file; read the class list if it is a file."""

    def absolute(value: Any) -> Any:
        if isinstance(value, list):
            return [absolute(each) for each in value]
        if not isinstance(value, str) or "://" in value or "::" in value:
            return value
        return str((folder / at_home(value)).resolve())

    for section, field in [
        (raw, "source"),
        (raw, "store"),
        (raw, "output"),
        (raw.get("evaluation"), "source"),
        (raw.get("evaluation"), "labels"),
        (_below(raw, "evaluation", "general"), "source"),
        (_below(raw, "evaluation", "general"), "labels"),
        (raw.get("describer"), "texts"),
    ]:
        if isinstance(section, dict) and section.get(field) is not None:
            section[field] = absolute(section[field])

    def is_model_folder(value: str) -> bool:
        beside = value != "embedded" and any((folder / value / name).is_file() for name in _CONFIGS)
        return value.startswith((".", "/", "~")) or beside

    for section, field, is_path in [
        (raw.get("clip"), "model", is_model_folder),
        (raw.get("clip"), "pretrained", lambda value: (folder / value).is_file()),
        (raw.get("neighbours"), "model", is_model_folder),
        (raw.get("neighbours"), "pretrained", lambda value: (folder / value).is_file()),
        (raw.get("describer"), "model", is_model_folder),
        (raw.get("describer"), "prompts", prompts.is_path),
        (_below(raw, "pairs", "describer"), "model", is_model_folder),
        (_below(raw, "pairs", "describer"), "prompts", prompts.is_path),
        (raw.get("clamp"), "lm", is_model_folder),
    ]:
        value = section.get(field) if isinstance(section, dict) else None
        if isinstance(value, str) and is_path(value):
            section[field] = absolute(value)
    for section, field in [(raw, "classes"), (_below(raw, "evaluation", "general"), "evaluation.general.classes")]:
        if isinstance(section, dict) and isinstance(section.get("classes"), str):
            section["classes"] = _class_list(field, section["classes"], Path(absolute(section["classes"])))


def _class_list(field: str, given: str, file: Path) -> list[str]:
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise PydanticCustomError(
            "classes",
            "`{field}: {given}`: the class list cannot be read ({why}); give a text file with one name on each line, "
            "or the names themselves as [a, b, ...]",
            {"field": field, "given": given, "why": str(error)},
        ) from error


def _below(raw: Any, *names: str) -> Any:
    for name in names:
        raw = raw.get(name) if isinstance(raw, dict) else None
    return raw


def _explain(error: Mapping[str, Any], raw: Any) -> str:
    """One line of the message: where, what, and a suggestion."""
    where: list[Any] = [part for part in error["loc"] if not str(part).startswith("function-")]
    after = where.index("describer") + 1 if "describer" in where else len(where)
    kind = where.pop(after) if after < len(where) else None
    field = ".".join(map(str, where))
    message = str(error["msg"])
    if named := re.match(r"`([\w.]+)", message):  # a check of several fields, which begins with the one that is meant
        where += named[1].split(".")
        field = ".".join(map(str, where))
        message = message.replace(named[1], field, 1)
    elif error["type"] == "extra_forbidden":
        known = list(_section(Domain, [*where[:-1], *([kind] if kind else [])]))
        # A beginning of the name, or nearly the name: `steps` has nothing to do with `eps`.
        near = difflib.get_close_matches(str(where[-1]), known, 1, 0.8)
        near += [name for name in known if name.startswith(str(where[-1]))]
        others = [f"`kind: {name}`" for name, each in KINDS.items() if kind and where[-1] in each.model_fields]
        message = f"goes with {' and '.join(others)}" if others else "unknown key; "
        if not others:
            message += f"did you mean `{near[0]}`?" if near else f"known are {', '.join(known)}"
    elif error["type"] == "missing":
        message = "is missing"
    elif error["type"] == "union_tag_invalid":
        known = re.findall("'([^']*)'", str(error["ctx"]["expected_tags"]))
        near = difflib.get_close_matches(str(error["ctx"]["tag"]), known, 1)
        where.append("kind")
        field += ".kind"
        message = f"{error['ctx']['tag']!r} is none of {', '.join(known)}" + (
            f"; did you mean {near[0]}?" if near else ""
        )
    elif error["type"] == "string_type":
        message = f"{error['input']!r} is not text; put it in quotes"
    elif error["type"] == "literal_error":
        known = re.findall("'([^']*)'", str(error["ctx"]["expected"]))
        near = difflib.get_close_matches(str(error["input"]), known, 1)
        message = f"{error['input']!r} is none of {error['ctx']['expected']}" + (
            f"; did you mean {near[0]}?" if near else ""
        )
    elif "input" in error and not isinstance(error["input"], (dict, list, BaseModel)):
        message = f"{message} (found {error['input']!r})"
    line = _line(raw, where)
    return f"  line {line}: {f'`{field}` ' if field and field not in message else ''}{message}"


def _section(model: type[BaseModel], where: Sequence[Any]) -> Iterator[str]:
    for name in where:
        if name in KINDS:
            model = KINDS[name]
        elif name in model.model_fields:
            for candidate in (model.model_fields[name].annotation, *get_args(model.model_fields[name].annotation)):
                if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                    model = candidate
    yield from model.model_fields


def _line(raw: Any, where: Sequence[Any]) -> int:
    """The 1-based line of a field, or of the closest thing around it that is in the file."""
    line = 1
    for name in where:
        try:
            line = (raw.lc.item(name) if isinstance(name, int) else raw.lc.key(name))[0] + 1
            raw = raw[name]
        except (AttributeError, KeyError, IndexError, TypeError):
            break
    return line
