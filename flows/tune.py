"""tune: the training of one domain, as a Prefect flow for a pool of machines that are made for it."""

from __future__ import annotations

from latteflow.flows.parameters import DomainOrFile, domain_flow
from latteflow.storage.artifacts import ArtifactRef
from latteflow.tasks.core.stage import StageResult
from latteflow.tasks.tune.tune import tune as tune_stage


@domain_flow()
def tune(
    domain: DomainOrFile,
    images: ArtifactRef,
    features: ArtifactRef,
    screened: ArtifactRef,
    paired: ArtifactRef | None = None,
) -> StageResult:
    """The stage `tune` on these artifacts; the run that waits finds its models in the store."""
    stages = (images, features, screened, *([paired] if paired else []))
    return tune_stage(domain, *map(StageResult.of, stages))
