"""pair: texts about pairs of images, as a Prefect flow for the GPU pool."""

from __future__ import annotations

from latteflow.flows.parameters import DomainOrFile, domain_flow
from latteflow.storage.artifacts import ArtifactRef
from latteflow.tasks.core.stage import StageResult
from latteflow.tasks.describe.pair import pair as pair_stage


@domain_flow()
def pair(domain: DomainOrFile, images: ArtifactRef, features: ArtifactRef, screened: ArtifactRef) -> StageResult:
    """The stage `pair` on these artifacts; the run that waits finds its texts in the store."""
    return pair_stage(domain, StageResult.of(images), StageResult.of(features), StageResult.of(screened))
