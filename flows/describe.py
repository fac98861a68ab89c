"""describe: the texts of a range of shards, as a Prefect flow for the GPU pool.

The worker needs the store and the describer's packages, not those of training: its environment has vLLM and no
open_clip. Texts go to the caption store, where the stages `describe` and `group` of the run that waits find them.
"""

from __future__ import annotations

from latteflow.flows.parameters import DomainOrFile, domain_flow
from latteflow.flows.pipeline import as_they_are
from latteflow.storage.artifacts import ArtifactRef
from latteflow.tasks.core.stage import StageResult
from latteflow.tasks.describe.describe import write_range


@domain_flow()
def describe(
    domain: DomainOrFile,
    first: int = 0,
    last: int | None = None,
    images: ArtifactRef | None = None,
    features: ArtifactRef | None = None,
) -> dict[str, int]:
    """Write the texts about the images of shards ``first`` to ``last - 1``, and about the groups anchored at them.

    May run twice, and beside others: each text is seen once.

    Args:
        images, features: `shard` and `embed` artifacts of the training images; default: the domain's newest.

    Returns:
        How many texts of each kind the range has.
    """
    if images is None or features is None:
        shards, embedded = as_they_are(domain, "shard", "embed")
    else:
        shards, embedded = StageResult.of(images), StageResult.of(features)
    return write_range(domain, shards, embedded, first, last)
