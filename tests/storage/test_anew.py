"""Making an artifact again: the old one stands until the new one is whole."""

from pathlib import Path

import pytest

from latteflow.storage.anew import AnewWriter
from latteflow.storage.artifacts import Artifact, ArtifactStore, ArtifactWriter
from latteflow.storage.errors import NotFound
from latteflow.storage.objects import ObjectStore

INPUTS = {"x": 1}


class Killed(BaseException):
    pass


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(ObjectStore(str(tmp_path)))


def make(writer: ArtifactWriter, parts: dict[str, bytes], die_after: int = 9) -> tuple[Artifact, list[str]]:
    """The artifact, and the parts that had to be made."""
    made = []
    for number, (name, data) in enumerate(parts.items()):
        if number == die_after:
            raise Killed
        if writer.find(name, {"p": name}) is None:
            writer.put(name, {"p": name}, {f"{name}.bin": data})
            made.append(name)
    return writer.finish(), made


def anew(store: ArtifactStore) -> AnewWriter:
    return AnewWriter(store, "d", "stage", 1, INPUTS)


def told(artifact: Artifact | None) -> list[bytes]:
    assert artifact is not None
    return [artifact.read(name) for name in artifact.names(".bin")]


def test_everything_is_made_again_and_takes_the_place_of_the_old(store: ArtifactStore) -> None:
    make(store.writer("d", "stage", 1, INPUTS), {"a": b"1", "b": b"2"})
    artifact, made = make(anew(store), {"a": b"3", "b": b"4"})
    assert made == ["a", "b"] and told(artifact) == [b"3", b"4"]
    assert told(store.find("d", "stage", 1, INPUTS)) == [b"3", b"4"]
    # The next increment takes up the new parts, and nothing of the attempt is left beside them.
    after, made = make(store.writer("d", "stage", 1, {"x": 2}), {"a": b"-", "b": b"-", "c": b"5"})
    assert made == ["c"] and told(after) == [b"3", b"4", b"5"]
    assert len(store.objects.names("d/stage/parts")) == 3


def test_the_old_artifact_stands_if_the_attempt_dies_and_its_parts_are_taken_up(store: ArtifactStore) -> None:
    old, _ = make(store.writer("d", "stage", 1, INPUTS), {"a": b"1", "b": b"2"})
    with pytest.raises(Killed):
        make(anew(store), {"a": b"3", "b": b"4"}, die_after=1)
    assert told(store.find("d", "stage", 1, INPUTS)) == [b"1", b"2"]
    artifact, made = make(anew(store), {"a": b"-", "b": b"4"})
    assert made == ["b"] and told(artifact) == [b"3", b"4"]
    assert told(old) == [b"1", b"2"]  # whoever had opened it goes on reading, whoever only knew of it is told
    assert told(store.open(artifact.ref)) == [b"3", b"4"]
    with pytest.raises(NotFound, match="was made anew meanwhile"):
        store.open(old.ref)


@pytest.mark.parametrize("writes", range(9))
def test_a_kill_at_any_write_leaves_the_old_or_the_new(
    store: ArtifactStore, writes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(store.writer("d", "stage", 1, INPUTS), {"a": b"1", "b": b"2"})
    left = [writes]

    def counted(method: str) -> None:
        def call(*args: object) -> object:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return getattr(ObjectStore, method)(store.objects, *args)

        monkeypatch.setattr(store.objects, method, call)

    for method in ("put", "put_if_absent", "delete"):
        counted(method)
    with pytest.raises(Killed):
        make(anew(store), {"a": b"3", "b": b"4"})
    monkeypatch.undo()
    assert told(store.find("d", "stage", 1, INPUTS)) in ([b"1", b"2"], [b"3", b"4"])
    make(anew(store), {"a": b"3", "b": b"4"})
    assert told(store.find("d", "stage", 1, INPUTS)) == [b"3", b"4"]


def test_the_same_bytes_are_the_same_artifact(store: ArtifactStore) -> None:
    old, _ = make(store.writer("d", "stage", 1, INPUTS), {"a": b"1"})
    again, made = make(anew(store), {"a": b"1"})
    assert made == ["a"] and again.ref == old.ref and again.manifest == old.manifest
    assert make(anew(store), {"a": b"1"})[1] == ["a"]
