"""init: a domain file that suits some images and this machine, for a person to read and correct."""

from __future__ import annotations

import csv
import io
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from latteflow.flows import machine
from latteflow.flows.console import document
from latteflow.flows.errors import UsageError
from latteflow.flows.machine import Gpu
from latteflow.models.errors import ModelError
from latteflow.models.settings import ClipSettings, OpenAISettings
from latteflow.models.towers import clip
from latteflow.storage.errors import DataError
from latteflow.tasks.core.domain import Classes, at_home
from latteflow.tasks.core.errors import ConfigError
from latteflow.tasks.core.schema import schema

if TYPE_CHECKING:
    from latteflow.tasks.ingest.survey import Found, Pictures

SCHEMA_FILE = "latteflow.schema.json"
"""Beside the domain files that name it in their first line."""
MOST_FOLDERS = 2000
"""Sub-folders that may be classes."""
_SHOWN_MODELS = 5
_NO_TEXT = {"true", "false", "null", "yes", "no", "on", "off"}


@dataclass(frozen=True)
class Weights:
    """A model of the hub, and the memory of a GPU in bytes that it needs."""

    repository: str
    memory: int
    config: str
    files: tuple[str, ...]

    @property
    def is_within_reach(self) -> bool:
        return machine.within_reach(self.repository, self.config, self.files)


@dataclass(frozen=True)
class Clip(Weights):
    """One of open_clip's."""

    name: str
    tag: str


_CLIP_FILES = ("open_clip_config.json", ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"))
_VLM_FILES = ("config.json", ("model.safetensors.index.json", "model.safetensors"))
CLIPS = (
    Clip("laion/CLIP-ViT-L-14-laion2B-s32B-b82K", 8 << 30, *_CLIP_FILES, "ViT-L-14", "laion2b_s32b_b82k"),
    Clip("laion/CLIP-ViT-B-32-laion2B-s34B-b79K", 0, *_CLIP_FILES, "ViT-B-32", "laion2b_s34b_b79k"),
)
"""Best first; the last needs no GPU."""
VLMS = (
    Weights("Qwen/Qwen2.5-VL-7B-Instruct", 22 << 30, *_VLM_FILES),
    Weights("Qwen/Qwen2.5-VL-3B-Instruct", 11 << 30, *_VLM_FILES),
)
"""Best first, with room for images and answers in the memory."""


@dataclass(frozen=True)
class Choice:
    """A line of the domain file, why it says so, and other lines that a person may want instead."""

    line: str
    why: str
    others: Sequence[str] = ()


@dataclass(frozen=True)
class Begun:
    """What was proposed.

    Attributes:
        file: the domain file.
        source: the source as the file says it, without the sub-folder of a split.
        classes: names; empty where a person has to give them.
        labels: class of each image that lies in a sub-folder named after it.
        schema_is_old: beside the file lies a schema that is not of this version, and was left there.
    """

    file: Path
    name: str
    source: str
    found: Found
    classes: Sequence[str]
    labels: Mapping[str, str]
    model: Choice
    resize: Choice
    describer: Choice
    schema_is_old: bool = False

    @property
    def labels_file(self) -> Path:
        return self.file.with_name(f"{self.file.stem}.labels.csv")

    @property
    def images(self) -> str:
        """How many, in words."""
        number = self.found.images
        thing = ("image" if self.found.are_files else "file") + "s" * (number != 1)
        return f"{number:,} {thing}{'' if self.found.are_files else ' of images'}"


def begin(
    source: str,
    out: Path | None = None,
    *,
    name: str | None = None,
    classes: str | None = None,
    server: str | None = None,
    force: bool = False,
) -> Begun:
    """Look at a source and at this machine, and write a domain file.

    Args:
        source: a folder, a pattern or an fsspec URL.
        out: the file; default: the domain's name with .yaml, in the working folder.
        name: of the domain; default: made from the source.
        classes: their names with commas between; default: the names of the sub-folders.
        server: address of a server that speaks OpenAI's chat API.
        force: replace what is there.

    Raises:
        ConfigError: an option is wrong, or a file is there already.
        DataError: no images, or sub-folders that cannot be classes.
        ModelError: the server does not answer.
        StorageError: the source cannot be reached.
    """
    name = _domain_name(source) if name is None else _checked_name(name)
    given = None if classes is None else _given_classes(classes)
    file = out or Path(f"{name}.yaml")
    if not file.parent.is_dir():
        raise UsageError(f"--out {str(file)!r}: there is no folder {str(file.parent)!r}; create it first")
    if not force:
        _must_be_new(file)
    address = _address(source, file.parent)
    answering = _server(server) if server else None  # a wrong address is told before anything is listed
    from latteflow.tasks.ingest.survey import survey  # and what decodes images, which a mistake above does not wait for

    found = survey(source)
    names = _class_names(found.folders.values()) if given is None else _named_so(given, found.folders.values())
    gpus = machine.gpus()
    resize = _resize(found.pictures)
    begun = Begun(
        file=file,
        name=name,
        source=address,
        found=found,
        classes=given or sorted(names.values()),
        labels={path: names[folder] for path, folder in found.folders.items() if folder in names},
        model=_model(gpus, resize.line),
        resize=resize,
        describer=answering or _describer(gpus),
    )
    if begun.labels:
        if not force:
            _must_be_new(begun.labels_file)
        _write(begun.labels_file, _table(begun.labels), force=force)
    _write(file, _text(begun), force=force)
    return replace(begun, schema_is_old=_write_schema(file.with_name(SCHEMA_FILE), force=force))


def _must_be_new(file: Path) -> None:
    if file.exists():
        raise ConfigError(f"{str(file)!r} is there already; give another --out, or --force to replace it")


def _write(file: Path, text: str, *, force: bool) -> None:
    try:
        with file.open("w" if force else "x", encoding="utf-8", newline="\n") as out:
            out.write(text)
    except OSError as error:
        raise ConfigError(f"{str(file)!r} cannot be written: {error.strerror or error}") from error


def _write_schema(file: Path, *, force: bool) -> bool:
    """Put the schema there unless one is; returns whether that one is of another version."""
    text = f"{document(schema())}\n"
    if file.exists() and not force:
        return file.read_text(encoding="utf-8", errors="replace") != text
    _write(file, text, force=force)
    return False


# Names.


def _domain_name(source: str) -> str:
    """The last folder of a path, pattern or URL, as a domain may be named."""
    path = source.partition("://")[2] if "://" in source else os.path.normpath(Path(source).absolute())
    fixed, star, _ = path.partition("*")
    last = (fixed.rpartition("/")[0] if star else fixed).rstrip("/").rpartition("/")[2]
    stem = re.sub(r"\.(tar|parquet|arrow)$", "", last, flags=re.IGNORECASE)
    plain = unicodedata.normalize("NFKD", stem).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9_]+", "-", plain).strip("-_")[:63].rstrip("-_") or "images"


def _checked_name(name: str) -> str:
    if re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,62}", name) is None:
        raise UsageError(f"--name {name!r}: lower-case letters, digits, - and _ only, such as {_domain_name(name)}")
    return name


def _address(source: str, folder: Path) -> str:
    """The source as the file says it: relative to the file where it lies below."""
    try:
        source.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"source {source!r}: its name is not UTF-8; rename it") from None
    if "://" in source or "::" in source:
        return source
    path = os.path.normpath(at_home(source).absolute())
    try:
        below = Path(path).relative_to(os.path.normpath(folder.absolute())).as_posix()
    except ValueError:
        return path
    return path if below.startswith("~") else below  # a file that says ~ means somebody's home


def _given_classes(classes: str) -> list[str]:
    found = [" ".join(name.split()) for name in classes.split(",")]
    found = [name for name in found if name]
    twice = _alike(found)
    if twice:
        raise UsageError(f"--classes {classes!r}: {' and '.join(map(repr, twice))} say the same thing; keep one")
    if len(found) < 2:
        raise UsageError(
            f"--classes {classes!r}: {len(found)} given, at least 2 are needed: the names of what the images may "
            "show, as in --classes robin,wren"
        )
    return found


def _alike(names: Iterable[str]) -> list[str]:
    """Names of which a model hears the same, of the first that there are."""
    by_prompt: dict[str, list[str]] = {}
    for name in names:
        by_prompt.setdefault(Classes.prompt_name(name), []).append(name)
    return next((same for same in by_prompt.values() if len(same) > 1), [])


def _class_names(folders: Iterable[str]) -> dict[str, str]:
    """A class for each sub-folder, in words."""
    folders = sorted(set(folders))
    if len(folders) > MOST_FOLDERS:
        raise DataError(
            f"the source has {len(folders):,} sub-folders, which are hardly classes (more than {MOST_FOLDERS:,}); name "
            "them yourself with --classes a,b,c"
        )
    numbered = re.compile(r"\d+[._\s-]+(?=[^\W\d_])")  # 001.Black_footed_Albatross
    begins = numbered if all(numbered.match(each) for each in folders) else re.compile("(?!)")
    found = {folder: _words(begins.sub("", folder, count=1)) for folder in folders}
    for folder, name in found.items():
        if not name:
            raise DataError(
                f"the sub-folder {folder!r} has no name that can be read; rename it, or give --classes a,b,c"
            )
    if twice := _alike(found.values()):
        which = [folder for folder, name in found.items() if name in twice]
        raise DataError(
            f"the sub-folders {' and '.join(map(repr, which[:3]))} say the same thing as classes; rename one, or give "
            "--classes a,b,c"
        )
    return found


def _words(folder: str) -> str:
    """A name without what cannot be printed, and with blanks for underscores."""
    seen = "".join(each if each.isprintable() else " " for each in folder.replace("_", " "))
    return " ".join(seen.split())


def _named_so(classes: Sequence[str], folders: Iterable[str]) -> dict[str, str]:
    """The sub-folders that are named after one of the classes that somebody gave."""
    by_prompt = {Classes.prompt_name(name): name for name in classes}
    found = {folder: by_prompt.get(Classes.prompt_name(_words(folder))) for folder in set(folders)}
    return {folder: name for folder, name in found.items() if name is not None}


# Choices.


def _resize(pictures: Pictures) -> Choice:
    seen = pictures.seen
    if not seen:
        return Choice("crop", "none of the images that were looked at can be decoded")
    of = f"of {seen} that were looked at"
    if 2 * pictures.bordered >= seen:
        return Choice("pad", f"{pictures.bordered} {of} have a white or transparent border, as icons and cut-outs")
    if 2 * pictures.long >= seen:
        return Choice("pad", f"{pictures.long} {of} are more than twice as long as wide, and would lose most")
    return Choice("crop", f"photos, it seems: {pictures.bordered} {of} have a white or transparent border")


def _model(gpus: Sequence[Gpu], resize: str) -> Choice:
    def line(each: Clip) -> str:
        return f"{{model: {each.name}, pretrained: {each.tag}, resize: {resize}}}"

    embedded = f"{{model: embedded, resize: {resize}}}"
    best = next(each for each in CLIPS if _memory(gpus) >= each.memory)
    if not best.is_within_reach:
        why = "a small stand-in that needs no download, as no model hub answers from here"
        try:
            clip.check(ClipSettings(model="embedded"))
        except ModelError as error:
            why = f"a small stand-in, as no model hub answers from here; {error}"
        return Choice(embedded, why, [line(each) for each in CLIPS])
    others = [line(each) for each in CLIPS if each is not best]
    return Choice(line(best), f"{_told(gpus)}; its weights are within reach", [*others, embedded])


def _describer(gpus: Sequence[Gpu]) -> Choice:
    def line(each: Weights) -> str:
        return f"{{kind: vllm, model: {each.repository}}}"

    tags = "{kind: tags}"
    server = "{kind: openai, url: http://127.0.0.1:8000/v1, model: NAME} # any server with OpenAI's chat API"
    best = next((each for each in VLMS if _memory(gpus) >= each.memory), None)
    if best is None:
        wanted = f"{line(VLMS[0])} # wants a GPU with {VLMS[0].memory >> 30} GiB"
        return Choice(tags, f"words that the CLIP itself finds; {_told(gpus)}", [wanted, server])
    if not machine.has("vllm"):
        lacks = "vLLM is not in this environment: docs/describers.md, Two environments"
    elif not best.is_within_reach:
        lacks = "no model hub answers from here: give the folder of a model"
    else:
        return Choice(line(best), f"a multimodal model; {_told(gpus)}", [tags, server])
    return Choice(tags, f"words that the CLIP itself finds; {_told(gpus)}, but {lacks}", [line(best), server])


def _memory(gpus: Sequence[Gpu]) -> int:
    return max((gpu.memory for gpu in gpus), default=0)


def _told(gpus: Sequence[Gpu]) -> str:
    return f"there is a GPU ({gpus[0]})" if gpus else "there is no GPU"


def _server(url: str) -> Choice:
    try:
        settings = OpenAISettings(kind="openai", url=url, model="")
    except ValidationError as error:
        raise UsageError(f"--server {url!r}: {error.errors()[0]['msg']}") from None
    from latteflow.tasks.describe.texts import models_of

    models = models_of(settings)
    if not models:
        raise DataError(f"the server at {url} has no model")
    lines = [f"{{kind: openai, url: {_scalar(url)}, model: {_scalar(each)}}}" for each in models[:_SHOWN_MODELS]]
    which = f"the first of {len(models)} models of a server" if len(models) > 1 else "the model of a server"
    return Choice(lines[0], f"{which}, which must read images; its key is that in {settings.key_env}", lines[1:])


# The file.


def _text(begun: Begun) -> str:
    model, resize, describer = begun.model, begun.resize, begun.describer
    lines = [
        f"# yaml-language-server: $schema={SCHEMA_FILE}",
        f"# Proposed by `latteflow init` from {begun.images}: read it, correct it. Paths are relative to this file.",
        f"name: {begun.name} # of the folder with the results",
        f"source: {_below(begun.source, begun.found.training)}",
        "",
        "# What the images may show, in words as one would say them: the model reads them.",
        *_class_list(begun.classes),
        'templates: ["a photo of a {}."] # sentences with one {} for the class, such as "a drawing of a {}."',
        "",
        *_evaluation(begun),
        "",
        f"# resize: {resize.line}: {resize.why}.",
        "# crop: the middle of a photo; pad: the whole picture on white.",
        f"clip: {model.line}",
        f"# {model.why[0].upper()}{model.why[1:]}. Or:",
        *(f"# clip: {each}" for each in model.others),
        "",
        f"# Who writes the texts: {describer.why}.",
        f"describer: {describer.line}",
        *(f"# describer: {each}" for each in describer.others),
    ]
    return "\n".join(lines) + "\n"


def _evaluation(begun: Begun) -> list[str]:
    if not begun.labels:
        return [
            "# Labels, if you have some; only `evaluate` reads them, nothing that trains ever does:",
            "# evaluation: {source: test/, labels: labels.csv} # columns path, class",
        ]
    held_out, labels = begun.found.held_out, _scalar(begun.labels_file.name)
    where = f"source: {_below(begun.source, held_out)}, " if held_out else ""
    lines = [
        f"# The sub-folders as labels of {len(begun.labels):,} images. Only `evaluate` reads them, never training.",
        "# Delete this if they are none.",
        f"evaluation: {{{where}labels: {labels}}} # columns path, class",
    ]
    more = "# These are the images adapted to; `source: test/` in it names others, with labels of their own."
    return lines if held_out else [*lines, more]


def _below(source: str, folder: str) -> str:
    return _scalar(f"{source.rstrip('/')}/{folder}" if folder else source)


def _class_list(classes: Sequence[str]) -> list[str]:
    if not classes:
        return [
            "classes: [] # name two or more, as in [robin, wren]; or give the path of a text file, one on each line"
        ]
    return ["classes:", *(f"  - {_scalar(each)}" for each in classes)]


def _scalar(text: str) -> str:
    """A text as YAML, in quotes unless it can only be read as a text."""
    if re.fullmatch(r"[^\W\d_][\w/. -]*[\w/]", text) and text.lower() not in _NO_TEXT:
        return text
    return '"' + "".join(map(_quoted, text)) + '"'


def _quoted(character: str) -> str:
    if character in '"\\':
        return f"\\{character}"
    return character if character.isprintable() else f"\\U{ord(character):08x}"


def _table(labels: Mapping[str, str]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["path", "class"])
    writer.writerows(labels.items())
    return out.getvalue()
