"""What adapting made a model forget: its towers on images of other classes, zero-shot, before and after."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from latteflow.models.methods.registry import METHODS
from latteflow.storage.artifacts import Artifact
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.features import read_features
from latteflow.tasks.ingest.embed import class_text_features
from latteflow.tasks.tune.models import ADAPTER, part_name, read_tuned, text_reader, tuned_features


def general_answers(
    domain: Domain, models: Artifact, images: Artifact, embedded: Artifact, method: str, seed: int | None
) -> np.ndarray:
    """The class of each image of `evaluation.general`, ``(n,)``, in the order of their features, by an adapted model.

    Only its towers take part: its classifier knows the domain's classes, so each class here is what the text tower
    reads in its sentences (by an adapter: in its name, as in training). Where the domain's embeddings are centred,
    these are, by their own mean, as they are for the untouched model.

    Args:
        images, embedded: of the split `general`.
    """
    own = domain.of_split("general")
    found = read_features(embedded)
    model = replace(read_tuned(models, method, seed), centre=found.shift)
    if adapter := METHODS[method].adapter:
        read = adapter.read(models.read(part_name(method, seed) + ADAPTER), domain.sections)
        text = read(own.prompt_names)
    else:
        text = class_text_features(own, text_reader(domain, model).text_features)
    answers: np.ndarray = (tuned_features(domain, model, images, found) @ text.T).argmax(axis=1)
    return answers
