"""latteflow in Python: domains, runs, what they leave, and the models that come of them. docs/python.md shows it.

What is named here stays as it is between minor versions; the rooms beneath (`flows`, `tasks`, `models`, `storage`) are
free to move. Their folders lie beside this one and are linked into it, so that nothing of ours is called `models` or
`tasks` where it is installed.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latteflow.api import (
        ConfigError,
        DataError,
        Domain,
        ModelError,
        Run,
        Stage,
        StorageError,
        UsageError,
        export,
        load_model,
        newest,
        plan,
        predict,
        run,
    )

__all__ = [
    "ConfigError",
    "DataError",
    "Domain",
    "ModelError",
    "Run",
    "Stage",
    "StorageError",
    "UsageError",
    "export",
    "load_model",
    "newest",
    "plan",
    "predict",
    "run",
]


def __getattr__(name: str) -> Any:
    # Whoever imports a room passes through here, and should not pay for the others.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from latteflow import api

    return getattr(api, name)
