"""Ranges of shards on another pool: how they are cut, begun again, taken over, and what the collecting run asks for."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.states import Running
from prefect.testing.utilities import prefect_test_harness

from chatserver import ChatServer, answer, error
from conftest import Domain
from latteflow.flows import fanout
from latteflow.flows.adapt import adapt
from latteflow.flows.describe import describe as describe_flow
from latteflow.flows.embed import embed as embed_flow
from latteflow.flows.fanout import FEATURES, WorkersFailed, cancel_workers, ranges
from latteflow.flows.parameters import domain_of
from latteflow.flows.pipeline import run_plainly
from latteflow.flows.tune import tune as tune_flow
from latteflow.storage.artifacts import ArtifactRef
from latteflow.storage.captions import CaptionStore
from latteflow.tasks.core.errors import ConfigError
from latteflow.tasks.core.stage import open_store


@pytest.mark.parametrize(
    ("missing", "most", "found"),
    [
        ([], 10, []),
        ([0, 0, 0], 10, []),
        ([4, 4, 4, 4], 8, [(0, 2), (2, 4)]),
        ([4, 0, 4, 9, 0, 1], 8, [(0, 3), (3, 4), (5, 6)]),
        ([100], 8, [(0, 1)]),
        ([1] * 2000, 100, [(start, start + 100) for start in range(0, 2000, 100)]),
    ],
)
def test_ranges(missing: list[int], most: int, found: list[tuple[int, int]]) -> None:
    assert [(each.start, each.stop) for each in ranges(missing, most)] == found


@pytest.fixture(scope="module")
def server() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture
def chat() -> Iterator[ChatServer]:
    chat = ChatServer()
    yield chat
    chat.close()


@pytest.fixture
def asked(domain: Domain, chat: ChatServer) -> Domain:
    """The domain with a server that is asked by workers, 20 texts in a run."""
    given = {
        **domain.model_dump(exclude_unset=True),
        "describer": {"kind": "openai", "url": chat.url, "model": "tiny"},
        "shard": {"images": 5},
        "workers": {"texts": 20, "attempts": 2},
    }
    return Domain.model_validate(given)


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Instead of workers: a run is made here and now. What is in the list is raised by them, one after the other."""
    troubles: list[Any] = []
    flows = {"describe/describe": describe_flow, "embed/embed": embed_flow, "tune/tune": tune_flow}

    @flow(name="worker")
    def worker(name: str, given: dict[str, Any]) -> Any:
        if troubles and (trouble := troubles.pop(0)):
            raise trouble
        refs = {each: ArtifactRef(**given[each]) for each in ("images", "features", "screened") if each in given}
        return flows[name].fn(**{**given, **refs, "domain": Domain.model_validate(given["domain"])})

    def start(name: str, *, parameters: dict[str, Any], **_: Any) -> Any:
        state = worker(name, parameters, return_state=True)
        return SimpleNamespace(id=state.state_details.flow_run_id)

    monkeypatch.setattr(fanout, "run_deployment", start)
    monkeypatch.setattr(fanout, "_LOOK_S", (0.05, 0.1))
    return troubles


def count(domain: Domain) -> int:
    captions = CaptionStore(open_store(domain).objects)
    return sum(captions.sample(who, 10**6).height for who in captions.describers())


@pytest.mark.slow
def test_a_failed_range_is_begun_again_and_the_rest_is_as_ever(
    server: None, asked: Domain, pool: list[Any], chat: ChatServer
) -> None:
    pool += [RuntimeError("the GPU fell off the bus"), None]
    flowed = {each.label: each for each in adapt(asked)}
    written, prompts = count(asked), len(chat.asked)
    assert written == prompts
    plain = run_plainly(asked.model_copy(update={"workers": None}))
    assert all(each.cached for each in plain) and len(chat.asked) == prompts
    assert {each.label: each.ref for each in plain} == {label: each.ref for label, each in flowed.items()}


def objects(domain: Domain) -> dict[str, bytes]:
    """What a store holds of a domain, but for what is about a run."""
    store = open_store(domain).objects
    about_a_run = ("/stat", "/running.json", "/report/", "/lock")
    return {key: store.read(key) for key in store.sizes(domain.name) if not any(part in key for part in about_a_run)}


@pytest.mark.slow
def test_features_by_ranges_and_models_are_those_of_one_process(server: None, domain: Domain, pool: list[Any]) -> None:
    """Those of both splits, which are embedded side by side; the first range fails at first."""
    given = domain.model_dump(exclude_unset=True)
    plain = Domain.model_validate({**given, "store": f"{domain.store}-plain"})
    run_plainly(plain)
    pooled = Domain.model_validate({**given, "workers": {"images": 8, "attempts": 2, "train": True}})
    pool.append(RuntimeError("the GPU fell off the bus"))
    adapt(pooled)
    assert pool == [] and objects(pooled) == objects(plain)
    with get_client(sync_client=True) as client:
        runs = len(client.read_flow_runs())
        assert all(each.cached for each in adapt(pooled))
        assert len(client.read_flow_runs()) == runs + 1  # itself alone


@pytest.mark.slow
def test_splits_leave_each_others_runs_alone(server: None, domain: Domain) -> None:
    @flow
    def nothing() -> None:
        pass

    given = {"images": "those of train"}
    with get_client(sync_client=True) as client:
        train, test = (fanout._Pool(client, domain, FEATURES, split) for split in ("train", "test"))
        mine, changed = (client.create_flow_run(nothing, parameters=given, state=Running()) for _ in range(2))
        client.update_flow_run(mine.id, tags=train._tags)
        client.update_flow_run(changed.id, tags=train._tags, parameters={"images": "other ones"})
        assert test.adopt({"images": "those of test"}) == [] and train.adopt(given) == [(0, 1)]
        names = {run.id: run.state.name for run in client.read_flow_runs() if run.state}
    assert names[mine.id] == "Running" and names[changed.id] in ("Cancelling", "Cancelled")


@pytest.mark.slow
def test_a_range_that_always_fails_fails_the_run(server: None, asked: Domain, pool: list[Any]) -> None:
    pool += [RuntimeError("the GPU fell off the bus")] * 20
    with pytest.raises(WorkersFailed, match=r"failed 2 times, at last as Failed: .*fell off the bus.*run again"):
        adapt(asked)


@pytest.mark.slow
def test_an_image_that_workers_cannot_describe_is_not_asked_about_where_there_is_no_gpu(
    server: None, asked: Domain, pool: list[Any], chat: ChatServer
) -> None:
    chat.script = lambda ask: error(400) if len(chat.asked) == 30 else answer("a shape")
    found = {each.label: each for each in adapt(asked)}
    assert found["describe"].counts["texts"] == 24
    prompts = len(chat.asked)
    assert all(each.cached for each in adapt(asked)) and len(chat.asked) == prompts


@pytest.mark.slow
def test_who_cancels_a_run_cancels_what_it_gave_away(server: None) -> None:
    @flow
    def nothing() -> None:
        pass

    with get_client(sync_client=True) as client:
        parent, child, other = (client.create_flow_run(nothing, state=Running()) for _ in range(3))
        client.update_flow_run(child.id, tags=[fanout._tag(parent.id)])
        cancel_workers(nothing, parent, None)
        names = {run.id: run.state.name for run in client.read_flow_runs() if run.state}
    assert names[child.id] in ("Cancelling", "Cancelled") and names[other.id] == names[parent.id] == "Running"


def test_a_domain_is_given_by_its_file(domain: Domain, tmp_path: Any) -> None:
    file = tmp_path / "domain.yaml"
    assert domain_of(str(file)) == domain and domain_of(domain) is domain
    with pytest.raises(ConfigError, match=r"`source`.* must be a URL"):
        domain_of(f"file://{file}")
    text = (
        file.read_text().replace("source: train", f"source: {tmp_path}/train").replace("store: store", "store: s3://b")
    )
    file.write_text("".join(line for line in text.splitlines(True) if not line.startswith(("evaluation", "describer"))))
    assert domain_of(f"file://{file}").store == "s3://b"
    with pytest.raises(ConfigError, match=r"'memory://none.yaml' cannot be read"):
        domain_of("memory://none.yaml")
