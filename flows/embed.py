"""embed: the features of a range of shards, as a Prefect flow for a pool of machines with the model.

Each shard's features are a part of the artifact that the stage `embed` of the run that waits then finishes.
"""

from __future__ import annotations

from latteflow.flows.parameters import DomainOrFile, domain_flow
from latteflow.flows.pipeline import as_they_are
from latteflow.storage.artifacts import ArtifactRef
from latteflow.tasks.core.stage import StageResult
from latteflow.tasks.ingest.embed import embed_range


@domain_flow()
def embed(
    domain: DomainOrFile, first: int = 0, last: int | None = None, images: ArtifactRef | None = None
) -> dict[str, int]:
    """Embed the images of shards ``first`` to ``last - 1``.

    May run twice, and beside others: the first part of a shard counts.

    Args:
        images: `shard` artifact; default: the newest of the training images.

    Returns:
        How many images the range has.
    """
    shards = StageResult.of(images) if images else as_they_are(domain, "shard")[0]
    return embed_range(domain, shards, first, last)
