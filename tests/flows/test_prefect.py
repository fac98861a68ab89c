"""The same graph under Prefect: a real server, real task runs, and cached stages that are shown as such."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from prefect.blocks.system import Secret
from prefect.client.orchestration import get_client
from prefect.testing.utilities import prefect_test_harness

from conftest import Domain
from latteflow.flows.adapt import adapt
from latteflow.flows.describe import describe
from latteflow.flows.pipeline import run_plainly
from latteflow.models.errors import ModelError
from latteflow.models.settings import OpenAISettings
from latteflow.tasks.core.domain import ShardSettings
from latteflow.tasks.describe.texts import _key


@pytest.fixture(scope="module")
def server() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.mark.slow
def test_a_key_may_lie_in_a_secret_block(server: None) -> None:
    Secret(value="the key").save("describer", _sync=True)
    settings = OpenAISettings(kind="openai", url="http://127.0.0.1:9/v1", model="tiny", key_block="describer")
    with ThreadPoolExecutor(1) as pool:  # a stage under Prefect runs in a thread
        assert _key(settings) == pool.submit(_key, settings).result() == "the key"
    with pytest.raises(ModelError, match=r"`key_block: nobody`: this Prefect Secret block gives no key .*`key_env`"):
        _key(settings.model_copy(update={"key_block": "nobody"}))


@pytest.mark.slow
def test_the_flow_makes_what_the_plain_function_makes(server: None, domain: Domain) -> None:
    flowed = adapt(domain)
    plain = run_plainly(domain.model_copy(update={"store": f"{domain.store}-plain"}))
    # The report carries timings; everything else is the same to the byte.
    assert [result.ref for result in flowed[:-1]] == [result.ref for result in plain[:-1]]


@pytest.mark.slow
def test_a_stage_that_takes_its_time_has_a_bar(server: None, domain: Domain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latteflow.flows.shown.Bar.every_s", 0.0)
    adapt(domain)
    with get_client(sync_client=True) as client:
        bars = {each.key: each for each in client.read_artifacts() if each.type == "progress"}
    wanted = {f"shapes-{stage}-progress" for stage in ("shard-train", "embed-train", "embed-test", "describe", "tune")}
    assert wanted <= bars.keys() and {bars[each].data for each in wanted} == {100.0}
    assert {bars[each].description for each in wanted} == {"done"}


@pytest.mark.slow
def test_a_second_flow_shows_its_stages_as_cached(server: None, domain: Domain) -> None:
    run_plainly(domain)
    again = adapt(domain, return_state=True)
    assert all(result.cached for result in again.result())
    names: dict[str, str] = {}
    limit = time.monotonic() + 60  # the server records task runs from events, some time after they happened
    with get_client(sync_client=True) as client:
        wanted = {"shapes-shard-train", "shapes-embed-train", "shapes-embed-test", "shapes-report"}
        while not wanted <= names.keys() and time.monotonic() < limit:
            names = {
                run.name: run.state.name
                for run in client.read_task_runs()
                if run.flow_run_id == again.state_details.flow_run_id and run.state and run.state.is_final()
            }
    assert {names[each] for each in wanted} == {"Cached"}


@pytest.mark.slow
def test_ranges_of_shards_are_described_by_flows_of_their_own(
    server: None, domain: Domain, monkeypatch: pytest.MonkeyPatch
) -> None:
    domain = domain.model_copy(update={"shard": ShardSettings(images=10)})
    for stage in ("shard", "embed"):
        run_plainly(domain, only=stage)
    found = [describe(domain, first, first + 2) for first in (0, 2)]
    assert [each["image"] for each in found] == [each["group"] for each in found] == [20, 4]
    monkeypatch.setattr(
        "latteflow.tasks.describe.texts.open_describer", lambda *_, **__: pytest.fail("a text was asked for again")
    )
    assert {result.label: result.counts for result in run_plainly(domain)}["describe"]["texts"] == 24


@pytest.mark.slow
def test_a_bad_domain_file_is_a_few_lines_and_names_its_run(
    server: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "bad.yaml").write_text("name: bad\nsource: train\nclasses: [a, b]\nepochs: 3\n")
    (tmp_path / "gone.yaml").write_text("name: gone\nsource: nowhere\nclasses: [a, b]\nclip: {model: embedded}\n")
    with get_client(sync_client=True) as client:
        for name, told in (("bad", "line 4: `epochs` unknown key"), ("gone", "nowhere")):
            caplog.clear()
            state = adapt(str(tmp_path / f"{name}.yaml"), return_state=True)
            assert state.is_failed() and told in state.message
            assert client.read_flow_run(state.state_details.flow_run_id).name == f"adapt-{name}"
            assert told in caplog.text and "Traceback" not in caplog.text
