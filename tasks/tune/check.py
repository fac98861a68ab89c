"""What is wrong with the models that a domain names, said before any stage runs."""

from __future__ import annotations

from latteflow.models.settings import TagsSettings
from latteflow.models.towers import clip, neighbours
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.stage import open_store
from latteflow.tasks.describe.texts import describer_identity


def check_models(domain: Domain) -> None:
    """Names, weights, folders and tables of the CLIP, the describers and the language model. No weights are loaded.

    Raises:
        ModelError: one cannot be had, with what was probably meant.
        DataError: a file or folder of a describer is not there.
    """
    who = clip.identity(domain.clip)
    # What has embedded the domain before is known to work, and to look closer takes the seconds that open_clip takes.
    if not any(made.inputs["clip"] == who for made in open_store(domain).all(domain.name, "embed")):
        clip.check(domain.clip)
    if domain.neighbours is not None:
        neighbours.check(domain.neighbours)
    for method in domain.methods:  # by which a language model, say, is looked for
        method.made_from(domain.sections)
    for writer in (domain, domain.of_pairs()) if domain.compares else (domain,):
        if not isinstance(writer.describer, TagsSettings):
            describer_identity(writer, None)
