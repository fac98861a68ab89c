"""The same graph under Prefect: a real server, real task runs, and cached stages that are shown as such."""

from collections.abc import Iterator

import pytest
from prefect.client.orchestration import get_client
from prefect.testing.utilities import prefect_test_harness

from conftest import Domain
from flows.adapt import adapt
from flows.pipeline import run_plainly


@pytest.fixture(scope="module")
def server() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.mark.slow
def test_the_flow_makes_what_the_plain_function_makes(server: None, domain: Domain) -> None:
    flowed = adapt(domain)
    plain = run_plainly(domain.model_copy(update={"store": f"{domain.store}-plain"}))
    # The report carries timings; everything else is the same to the byte.
    assert [result.ref for result in flowed[:-1]] == [result.ref for result in plain[:-1]]


@pytest.mark.slow
def test_a_second_flow_shows_its_stages_as_cached(server: None, domain: Domain) -> None:
    run_plainly(domain)
    again = adapt(domain, return_state=True)
    assert all(result.cached for result in again.result())
    with get_client(sync_client=True) as client:
        runs = client.read_task_runs()
    names = {run.name: run.state.name for run in runs if run.flow_run_id == again.state_details.flow_run_id}
    assert names["shard-train"] == names["embed"] == names["report"] == "Cached"
