"""What a deployment is told: a domain, or where its file is; and how its run is named, and says what was wrong."""

from __future__ import annotations

import functools
import logging
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import fsspec
from prefect import Flow
from prefect.runtime import flow_run
from prefect.states import Failed
from pydantic import BeforeValidator, Field, ValidationError, WithJsonSchema, validate_call

from latteflow.models.errors import ModelError
from latteflow.storage.errors import DataError, StorageError
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.errors import ConfigError


def domain_of(given: Any) -> Any:
    """The domain of a file, by its path or fsspec URL; anything but a text is returned as it is.

    A path is one of the machine that runs the flow, where the deployment's pull step has led: relative to the project's
    root.

    Raises:
        ConfigError: there is no such file, or it is no domain file; each mistake with its line.
    """
    if not isinstance(given, str):
        return given
    if "://" not in given:
        return Domain.load(given)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / given.rsplit("/", 1)[-1]
        try:
            with fsspec.open(given, "rb") as file:
                copy.write_bytes(file.read())
        except Exception as error:  # each file system's and its driver's own
            raise ConfigError(f"domain file {given!r} cannot be read: {type(error).__name__}: {error}") from error
        domain = Domain.load(copy)
    near = sorted(name for name, value in domain.model_dump().items() if _lies_in(value, folder) and name != "output")
    if near:
        raise ConfigError(
            f"domain file {given!r}: {', '.join(f'`{name}`' for name in near)} must be a URL or begin with /, as "
            "nothing lies beside a file that is read from a URL"
        )
    return domain


def _lies_in(value: Any, folder: str) -> bool:
    if isinstance(value, dict):
        return any(_lies_in(each, folder) for each in value.values())
    if isinstance(value, list):
        return any(_lies_in(each, folder) for each in value)
    return isinstance(value, str) and value.startswith(str(Path(folder).resolve()))


def told_by_key(schema: Any, definitions: Mapping[str, Any]) -> Any:
    """A JSON schema without references, whose alternatives are chosen by type or by `kind`.

    Of a value that fits none of several alternatives a validator says no more than that. Here it is held to the one
    that is meant, and the message names the key that is wrong.

    Args:
        schema: as pydantic writes it, or a part of it.
        definitions: what its references lead to.
    """
    if isinstance(schema, list):
        return [told_by_key(each, definitions) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    if "$ref" in schema:
        schema = {**definitions[schema["$ref"].rsplit("/", 1)[-1]], **schema}
    found = {key: told_by_key(value, definitions) for key, value in schema.items() if key not in ("$ref", "$defs")}
    if "oneOf" in found:  # models that are told apart by their `kind`
        kinds = {each["properties"]["kind"]["const"]: each for each in found.pop("oneOf")}
        found |= {"type": "object", "required": ["kind"], "properties": {"kind": {"enum": list(kinds)}}}
        found["allOf"] = [
            {"if": {"properties": {"kind": {"const": name}}}, "then": each} for name, each in kinds.items()
        ]
    elif "anyOf" in found and _differ([each.get("type") for each in found["anyOf"]]):
        each_of = found.pop("anyOf")
        found["type"] = [each["type"] for each in each_of]
        found["allOf"] = [{"if": {"type": each["type"]}, "then": each} for each in each_of]
    return found


def _differ(types: list[Any]) -> bool:
    return all(isinstance(each, str) for each in types) and len(set(types)) == len(types)


def _schema() -> dict[str, Any]:
    schema = Domain.model_json_schema()
    either = {"anyOf": [{key: value for key, value in schema.items() if key != "$defs"}, {"type": "string"}]}
    found: dict[str, Any] = told_by_key(either, schema["$defs"])
    return found


DomainOrFile = Annotated[
    Domain,
    BeforeValidator(domain_of),
    WithJsonSchema(_schema()),
    Field(description="A domain file: its path or URL; or what would stand in it."),
]


MISTAKES = (ConfigError, DataError, ModelError, StorageError)
"""What the user or the world did wrong."""


def _without_traceback(record: logging.LogRecord) -> bool:
    # The engine raises what a failed run holds once more, and logs where; the state has said what.
    if record.exc_info and isinstance(record.exc_info[1], MISTAKES):
        record.exc_info = None
    return True


def told(work: Callable[..., Any]) -> Callable[..., Any]:
    """The same, but what the user or the world did wrong is the state of the run, and no traceback in its log."""

    @functools.wraps(work)
    def tell(*args: Any, **kwargs: Any) -> Any:
        for name in ("prefect.flow_runs", "prefect.engine"):
            logging.getLogger(name).addFilter(_without_traceback)
        try:
            return work(*args, **kwargs)
        except ValidationError as error:
            wrong = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
            mistake = ConfigError("\n".join(wrong))
            return Failed(message=str(mistake), data=mistake)
        except MISTAKES as error:
            return Failed(message=str(error), data=error)

    return tell


def domain_flow(**options: Any) -> Callable[[Callable[..., Any]], Flow[..., Any]]:
    """A Prefect flow of one domain, its first parameter; its runs are named after flow and domain."""

    def make(work: Callable[..., Any]) -> Flow[..., Any]:
        checked = functools.wraps(work)(told(validate_call(work)))
        return Flow(checked, name=work.__name__, flow_run_name=_run_name, validate_parameters=False, **options)

    return make


def _run_name() -> str:
    given = flow_run.parameters
    domain = given["domain"]
    try:
        name = domain["name"] if isinstance(domain, dict) else domain_of(domain).name
    except (ConfigError, KeyError):  # which the run itself will say
        name = Path(str(domain)).stem
    part = f"-{given['first']}-{given['last']}" if "first" in given else ""
    return f"{flow_run.flow_name}-{name}{part}"
