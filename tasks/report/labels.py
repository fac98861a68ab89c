"""The labels, behind one door: `evaluate` alone may import this module, and an import contract says so."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence

import numpy as np

from latteflow.storage.errors import DataError
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.tables import digest_of_table, read_by_path


def digest_of_labels(domain: Domain) -> str | None:
    """Digest of the file with the labels; None where the domain has none.

    Raises:
        DataError: it cannot be read.
    """
    return digest_of_table(domain.evaluation.labels) if domain.evaluation else None


def read_truth(domain: Domain, paths: Sequence[str]) -> np.ndarray:
    """Class number of each image, -1 where it has no label.

    Raises:
        DataError: labels are unreadable, name unknown classes, or fit no image.
    """
    if domain.evaluation is None:
        return np.full(len(paths), -1)
    sources = domain.evaluation.source or domain.source
    labels = read_by_path(domain.evaluation.labels, "class", sources, paths)
    numbers = {domain.prompt_name(name): number for number, name in enumerate(domain.classes)}
    unknown = Counter(name for name in labels.values() if domain.prompt_name(name) not in numbers)
    if unknown:
        lines = []
        for name, count in unknown.most_common(5):
            near = difflib.get_close_matches(name, domain.classes, 1)
            lines.append(f"{name!r} ({count} images)" + (f", did you mean {near[0]!r}?" if near else ""))
        raise DataError(
            f"labels {domain.evaluation.labels!r} name {len(unknown)} class(es) that are not in `classes`: "
            f"{'; '.join(lines)}"
        )
    return np.array([numbers[domain.prompt_name(labels[path])] if path in labels else -1 for path in paths])
