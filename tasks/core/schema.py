"""The JSON schema of domain files, for editors and other programs: every key, what it means, and what it takes."""

from __future__ import annotations

from typing import Any

from latteflow.tasks.core.domain import Domain

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schema() -> dict[str, Any]:
    """Of what may stand in a file, with the methods and describers of installed packages.

    It says less than :meth:`~tasks.core.domain.Domain.load`, which also looks at what goes together.
    """
    found = Domain.model_json_schema()
    for each in (found, found["$defs"]["GeneralSettings"]):
        classes = each["properties"]["classes"]
        names = {"type": classes.pop("type"), "items": classes.pop("items"), "minItems": 2}
        classes["anyOf"] = [names, {"type": "string"}]  # the latter is the path of a list
    return {"$schema": _DIALECT, "title": "A domain of latteflow", **{k: v for k, v in found.items() if k != "title"}}
