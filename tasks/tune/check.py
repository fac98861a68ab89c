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
    # What has embedded the domain before is known to work, and to look closer takes the seconds that open_clip and timm
    # take.
    before = [made.inputs for made in open_store(domain).all(domain.name, "embed")]
    who = clip.identity(domain.clip)
    if not any(inputs["clip"] == who for inputs in before):
        clip.check(domain.clip)
    if domain.neighbours is not None:
        near = neighbours.identity(domain.neighbours)
        if not any(inputs.get("neighbours") == near for inputs in before):
            neighbours.check(domain.neighbours)
    for method in domain.methods:  # by which a language model, say, is looked for
        method.made_from(domain.sections)
    for writer in (domain, domain.of_pairs()) if domain.compares else (domain,):
        if not isinstance(writer.describer, TagsSettings):
            describer_identity(writer, None)
