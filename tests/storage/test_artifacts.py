"""Artifacts: visible when whole, repaired when not."""

import json
from pathlib import Path

import pytest

from latteflow.storage.artifacts import Artifact, ArtifactStore
from latteflow.storage.errors import Damaged, NotFound, StorageError
from latteflow.storage.objects import ObjectStore

INPUTS = {"x": 1}


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(ObjectStore(str(tmp_path)))


def make(store: ArtifactStore, parts: dict[str, bytes], inputs: dict[str, int] = INPUTS) -> Artifact:
    writer = store.writer("d", "stage", 1, inputs)
    for name, data in parts.items():
        if writer.find(name, {"p": name}) is None:
            writer.put(name, {"p": name}, {f"{name}.bin": data}, rows=1, counts={"rows": 1})
    return writer.finish({"extra": 2}, {"lib": "1"})


def data_file(store: ArtifactStore, name: str) -> Path:
    return next(Path(store.objects.path("d/stage/data")).glob(f"{name}.*"))


def test_nothing_is_visible_before_the_manifest(store: ArtifactStore) -> None:
    writer = store.writer("d", "stage", 1, INPUTS)
    writer.put("a", {}, {"a.bin": b"1"})
    assert store.find("d", "stage", 1, INPUTS) is None
    writer.finish()
    assert store.find("d", "stage", 1, INPUTS) is not None


def test_what_was_put_is_read(store: ArtifactStore, tmp_path: Path) -> None:
    artifact = make(store, {"a": b"one", "b": b"two"})
    assert artifact.read("a.bin") == b"one"
    assert artifact.fetch("b.bin", tmp_path).read_bytes() == b"two"
    assert artifact.counts == {"rows": 2, "extra": 2}
    assert artifact.names(".bin") == ["a.bin", "b.bin"]
    assert Path(artifact.address("a.bin")).read_bytes() == b"one"
    with pytest.raises(NotFound, match=r"c\.bin"):
        artifact.read("c.bin")
    assert store.open(artifact.ref).ref == artifact.ref


def test_a_resumed_artifact_is_the_same_to_the_byte(store: ArtifactStore, tmp_path: Path) -> None:
    writer = store.writer("d", "stage", 1, INPUTS)
    writer.put("a", {"p": "a"}, {"a.bin": b"one"}, rows=1, counts={"rows": 1})  # and then the process dies
    resumed = make(store, {"a": b"never used", "b": b"two"})
    whole = make(ArtifactStore(ObjectStore(str(tmp_path / "other"))), {"a": b"one", "b": b"two"})
    assert resumed.manifest == whole.manifest


def test_a_growing_artifact_reuses_its_parts(store: ArtifactStore) -> None:
    make(store, {"a": b"one"})
    writer = store.writer("d", "stage", 1, {"x": 2})
    assert writer.find("a", {"p": "a"}) is not None
    assert writer.find("b", {"p": "b"}) is None
    assert writer.reused == 1


def test_equal_content_has_an_equal_digest(store: ArtifactStore) -> None:
    first, second = make(store, {"a": b"one"}), make(store, {"a": b"one"}, {"x": 2})
    assert first.ref.digest == second.ref.digest
    assert first.ref.fingerprint != second.ref.fingerprint


@pytest.mark.parametrize("harm", ["delete", "cut"])
def test_a_lost_or_short_file_makes_the_part_again(store: ArtifactStore, harm: str) -> None:
    before = make(store, {"a": b"one", "b": b"two"})
    file = data_file(store, "a")
    file.unlink() if harm == "delete" else file.write_bytes(b"o")
    assert store.find("d", "stage", 1, INPUTS) is None
    with pytest.raises(NotFound, match="run the pipeline again"):
        store.open(before.ref)
    writer = store.writer("d", "stage", 1, INPUTS)
    assert writer.find("a", {"p": "a"}) is None
    assert writer.find("b", {"p": "b"}) is not None
    again = make(store, {"a": b"one", "b": b"two"})
    assert again.read("a.bin") == b"one"
    assert again.ref == before.ref


def test_flipped_bits_are_set_aside_and_made_again(store: ArtifactStore) -> None:
    artifact = make(store, {"a": b"one", "b": b"two"})
    data_file(store, "a").write_bytes(b"oNe")
    with pytest.raises(Damaged, match=r"a\..*moved to d/stage/damaged"):
        artifact.read("a.bin")
    assert next(Path(store.objects.path("d/stage/damaged")).iterdir()).read_bytes() == b"oNe"
    assert store.find("d", "stage", 1, INPUTS) is None
    assert make(store, {"a": b"one", "b": b"two"}).read("a.bin") == b"one"


def test_the_first_of_two_workers_is_everybodys(store: ArtifactStore) -> None:
    one, two = (store.writer("d", "stage", 1, INPUTS) for _ in range(2))
    one.put("a", {}, {"a.bin": b"from one"})
    two.put("a", {}, {"a.bin": b"from two"})  # a stage that is not deterministic
    assert one.finish().ref == two.finish().ref
    assert store.open(two.finish().ref).read("a.bin") == b"from one"


def test_a_manifest_that_is_none_is_never_taken_for_not_done(store: ArtifactStore) -> None:
    artifact = make(store, {"a": b"one"})
    path = Path(store.objects.path(f"d/stage/{artifact.fingerprint}/manifest.json"))
    good = path.read_text()
    path.write_text("{")
    with pytest.raises(Damaged, match=r"manifest\.json is no record.*moved to d/stage/damaged/"):
        store.find("d", "stage", 1, INPUTS)
    path.write_text(json.dumps({**artifact.manifest, "format": 99}))
    with pytest.raises(StorageError, match="newer latteflow"):
        store.find("d", "stage", 1, INPUTS)
    path.write_text(json.dumps({"format": 1}))
    with pytest.raises(StorageError, match=r"not a manifest \('domain'\); delete it"):
        store.find("d", "stage", 1, INPUTS)
    path.write_text(json.dumps(artifact.manifest))  # of a version whose records had no digest of their own
    assert store.open(artifact.ref).manifest == artifact.manifest
    path.write_text(good)
    assert store.open(artifact.ref).manifest == artifact.manifest


@pytest.mark.parametrize("record", ["parts/*.json", "*/manifest.json"])
def test_a_flipped_bit_in_a_record_is_noticed(store: ArtifactStore, record: str) -> None:
    made = make(store, {"a": b"one"})
    path = next(Path(store.objects.path("d/stage")).glob(record))
    good = path.read_bytes()
    path.write_bytes(good.replace(made.files["a.bin"][1].sha256[:8].encode(), b"00000000", 1))
    with pytest.raises(Damaged, match="no record, or not as it was written"):
        store.find("d", "stage", 1, INPUTS)
        store.writer("d", "stage", 1, INPUTS).find("a", {"p": "a"})
    assert next(Path(store.objects.path("d/stage/damaged")).iterdir()).read_bytes() != good
    again = make(store, {"a": b"one"})
    assert again.read("a.bin") == b"one" and path.read_bytes() == good


def test_a_file_that_is_gone_makes_its_part_again(store: ArtifactStore) -> None:
    made = make(store, {"a": b"one", "b": b"two"})
    data_file(store, "a").unlink()
    with pytest.raises(Damaged, match=r"does not exist, though a record names it"):
        made.read("a.bin")
    assert make(store, {"a": b"one", "b": b"two"}).read("a.bin") == b"one"


def test_one_bad_read_moves_nothing(store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(store, {"a": b"one"})
    plain = ObjectStore.read
    cut = iter([True, False] * 9)
    monkeypatch.setattr(ObjectStore, "read", lambda self, key: plain(self, key)[: 2 if next(cut) else None])
    assert made.read("a.bin") == b"one"
    assert store.open(made.ref).ref == made.ref
    assert store.objects.sizes("d/stage/damaged") == {}


def test_a_record_that_vanishes_under_a_commit_is_written(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.commit("d/stage/parts/x.json", {"by": "another"})
    plain = ObjectStore.read

    def vanish(self: ObjectStore, key: str) -> bytes:
        self.delete(key)
        return plain(self, key)

    monkeypatch.setattr(ObjectStore, "read", vanish)
    assert store.commit("d/stage/parts/x.json", {"by": "us"}) == {"by": "us"}
