"""Texts through the caption store: asked once, whoever wants them, whatever happens half-way."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import latteflow.tasks.describe.texts
from chatserver import Ask, ChatServer, Reply, answer, error
from conftest import draw, draw_folder
from latteflow.flows.pipeline import run_plainly
from latteflow.models.errors import ModelError
from latteflow.models.texts.describers import EngineStopped, Item, Kind, Prompt, Text
from latteflow.storage.captions import CAPTION_SCHEMA, CaptionStore
from latteflow.storage.errors import Damaged
from latteflow.storage.objects import ObjectStore
from latteflow.storage.tables import read_parquet
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.stage import StageResult, open_store, rules
from latteflow.tasks.describe.describe import describe
from latteflow.tasks.describe.group import group
from latteflow.tasks.describe.texts import Gallery, Question, Texts, describer_identity
from latteflow.tasks.ingest.embed import embed
from latteflow.tasks.ingest.shard import shard

pytestmark = pytest.mark.slow

PACK = """\
name: own
version: 1
variables: [class]
image: ["What is it?", "Is it a {class}?"]
group: What have they in common?
classes: ["What is a {class}?", "Describe a {class}."]
"""


@dataclass(frozen=True)
class Made:
    """A store with the images of a domain, and what was made of them."""

    folder: Path
    shards: StageResult
    embedded: StageResult


def load(folder: Path, *, name: str = "shapes", group: str = "{}", **describer: Any) -> Domain:
    """The domain of these tests, with settings of its describer and others."""
    asked = {"kind": "openai", "url": "http://127.0.0.1:9/v1", "model": "tiny", "prompts": "own.yaml", **describer}
    (folder / "domain.yaml").write_text(
        f"""\
name: {name}
source: {SOURCE[0] / "train"}
classes: [red, green, blue]
templates: ["a {{}} shape."]
evaluation: {{source: {SOURCE[0] / "test"}, labels: {SOURCE[0] / "labels.csv"}}}
clip: {{model: {SOURCE[1]}, resize: pad, centre: false}}
describer: {json.dumps(asked)}
group: {group}
latteclip: {{epochs: 1, batch_size: 8}}
seeds: [0]
shard: {{images: 5}}
store: store
output: runs
"""
    )
    if not (folder / "own.yaml").exists():
        (folder / "own.yaml").write_text(PACK)
    return Domain.load(folder / "domain.yaml")


SOURCE: list[Path] = []


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path) -> Made:
    """12 images in 3 shards, two of them of the same bytes."""
    folder = tmp_path_factory.mktemp("texts")
    draw_folder(folder / "train", 10)
    draw(10, "green").save(folder / "train" / "010.jpg", quality=95)
    shutil.copy(folder / "train" / "000.png", folder / "train" / "twin.png")
    test = draw_folder(folder / "test", 6, first=100)
    (folder / "labels.csv").write_text("path,class\n" + "".join(f"{path},{name}\n" for path, name in test.items()))
    SOURCE[:] = [folder, tiny_clip]
    domain = load(folder)
    shards = shard(domain, "train")
    return Made(folder, shards, embed(domain, shards))


@pytest.fixture
def here(made: Made, tmp_path: Path) -> Path:
    """A folder with a copy of the store."""
    shutil.copytree(made.folder / "store", tmp_path / "store")
    return tmp_path


@dataclass
class Fake:
    """A describer that is asked by `tasks.describe.texts`, and misbehaves on demand."""

    batch: int = 4
    stop_after: int | None = None
    """It dies after so many texts."""
    fails: Callable[[str], bool] = lambda prompt: False
    leaves_out: int = 0
    asked: list[tuple[Kind, Item]] = field(default_factory=list)
    proven: list[bool] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    engine: str = "fake 1"
    waited: float = 0.125

    def describe(self, kind: Kind, items: Sequence[Item]) -> Iterator[Mapping[int, Text]]:
        places = list(range(len(items)))[self.leaves_out :]
        for start in range(0, len(places), self.batch):
            done: dict[int, Text] = {}
            for place in places[::-1][start : start + self.batch]:
                if self.stop_after is not None and len(self.asked) >= self.stop_after:
                    if done:
                        yield done
                    raise EngineStopped("it died")
                item = items[place]
                self.asked.append((kind, item))
                self.events.append(f"asked {item.paths}")
                failed = self.fails(item.prompt)
                done[place] = Text.failed("too long") if failed else Text(f"{item.prompt} {sorted(item.paths)[:1]}")
            yield done

    def prompts(self) -> list[str]:
        return [item.prompt for _, item in self.asked]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    found = Fake()

    def opened(domain: Domain, gallery: Gallery, *, proven: bool = False) -> Fake:
        found.proven.append(proven)
        return found

    monkeypatch.setattr(latteflow.tasks.describe.texts, "open_describer", opened)
    return found


def opened(
    made: Made, domain: Domain, kind: Kind = "image", objects: ObjectStore | None = None
) -> tuple[Gallery, Texts]:
    store = open_store(domain)
    gallery = Gallery(domain, store.open(made.shards.ref), store.open(made.embedded.ref))
    return gallery, Texts(domain, objects or store.objects, kind, gallery, describer_identity(domain, made.embedded))


def written(texts: Texts, parts: Mapping[str, Sequence[Question]]) -> dict[str, pl.DataFrame]:
    found = list(texts.write(parts))
    assert len(dict(found)) == len(found)
    return dict(found)


def by_shard(gallery: Gallery) -> dict[str, list[Question]]:
    return {
        name: [each for key in keys for each in gallery.questions("image", [key])]
        for name, keys in gallery.keys_by_shard().items()
    }


def test_rows_come_in_the_order_of_their_questions(made: Made, here: Path, fake: Fake) -> None:
    gallery, texts = opened(made, load(here))
    parts = by_shard(gallery)
    found = written(texts, parts)
    assert found.keys() == parts.keys() and len(parts) == 3
    for name, questions in parts.items():
        table = found[name]
        assert table["member_keys"].to_list() == [list(each.members) for each in questions]
        assert table["index"].to_list() == [0, 1] * (len(questions) // 2)
        assert table["prompt"].to_list() == [each.prompt for each in questions]
        assert table["text"].str.starts_with("What is it?").to_list() == [True, False] * (len(questions) // 2)
    row = found["shard-00000"].row(1, named=True)
    assert row["prompt"] in ("Is it a red?", "Is it a green?", "Is it a blue?")
    assert (row["model"], row["prompt_id"], row["engine"], row["kind"]) == ("tiny", "own/1", "fake 1", "image")
    assert '"max_tokens":77' in row["sampling"] and texts.timings["engine_wait"] == 0.125


def test_the_same_content_is_asked_about_once(made: Made, here: Path, fake: Fake) -> None:
    gallery, texts = opened(made, load(here))
    table = pl.concat(written(texts, by_shard(gallery)).values())
    assert table.height == 24 and len(fake.asked) == 22
    twins = table.filter(pl.col("members").list.first().is_duplicated() & (pl.col("index") == 0)).filter(
        pl.col("member_keys").list.first().is_first_distinct()
    )
    shared = twins.group_by("members").agg(pl.col("member_keys").n_unique(), pl.col("text").n_unique())
    assert shared.filter(pl.col("member_keys") == 2)["text"].to_list() == [1]


def test_a_text_is_not_asked_for_again_by_another_run_or_domain(made: Made, here: Path, fake: Fake) -> None:
    gallery, texts = opened(made, load(here))
    before = written(texts, by_shard(gallery))
    for name in ("shapes", "other"):
        gallery, texts = opened(made, load(here, name=name))
        after = written(texts, by_shard(gallery))
        assert all(after[part].equals(before[part]) for part in before)
    assert len(fake.asked) == 22


def test_a_part_comes_as_soon_as_its_texts_are_there(made: Made, here: Path, fake: Fake) -> None:
    gallery, texts = opened(made, load(here))
    keys = gallery.index.unique("sha256", maintain_order=True)["key"].to_list()[:6]
    fake.batch = 1
    parts = {key: gallery.questions("image", [key])[:1] for key in keys}
    for name, _ in texts.write(parts):
        fake.events.append(f"got {name}")
    assert [event.split()[0] for event in fake.events] == ["asked", "got"] * 6
    assert list(texts.write({**parts, "empty": []}))[-1][0] == "empty"


def test_a_run_that_stopped_half_way_goes_on_where_it_was(made: Made, here: Path, fake: Fake) -> None:
    gallery, texts = opened(made, load(here))
    parts = by_shard(gallery)
    fake.stop_after = 13
    got = {}
    with pytest.raises(EngineStopped, match="it died"):
        for name, table in texts.write(parts):
            got[name] = table
    assert 0 < len(got) < 3  # whole parts that were there came before it stopped
    fake.stop_after = None
    again = written(opened(made, load(here))[1], parts)
    assert len(fake.asked) == 22 and len({(item.paths, item.prompt) for _, item in fake.asked}) == 22
    assert all(again[name].equals(table) for name, table in got.items())


def test_the_stages_stop_and_go_on_as_well(made: Made, here: Path, fake: Fake) -> None:
    domain = load(here)
    fake.stop_after = 13
    with pytest.raises(EngineStopped):
        describe(domain, made.shards, made.embedded)
    fake.stop_after = None
    result = describe(domain, made.shards, made.embedded)
    assert result.counts == {"texts": 24, "flagged": 0, "class_texts": 6}
    groups = group(domain, made.shards, made.embedded)
    assert groups.counts["texts"] == groups.counts["groups"] == 12
    kinds = Counter(kind for kind, _ in fake.asked)
    assert kinds["image"] == 22 and kinds["class"] == 6 and 1 <= kinds["group"] <= 12
    asked = len(fake.asked)
    assert describe(domain, made.shards, made.embedded).cached and group(domain, made.shards, made.embedded).cached
    assert len(fake.asked) == asked


def test_failures_are_asked_again_when_their_part_is(made: Made, here: Path, fake: Fake) -> None:
    gallery, texts = opened(made, load(here))
    parts = by_shard(gallery)
    fake.fails = lambda prompt: prompt == "What is it?"
    first = pl.concat(written(texts, parts).values())
    assert first.filter(pl.col("finish_reason") == "error")["detail"].to_list() == ["too long"] * 12
    fake.fails, fake.asked = (lambda prompt: False), []
    second = pl.concat(written(opened(made, load(here))[1], parts).values())
    assert set(fake.prompts()) == {"What is it?"} and len(fake.asked) == 11
    assert second["flags"].list.len().sum() == 0 and second.height == 24


def test_whether_the_describer_ever_gave_a_text_is_known(made: Made, here: Path, fake: Fake) -> None:
    gallery, texts = opened(made, load(here))
    one, two, three = (gallery.questions("image", [key])[:1] for key in gallery.index["key"].to_list()[1:4])
    fake.fails = lambda prompt: True
    written(texts, {"a": one})
    fake.fails = lambda prompt: False
    written(texts, {"a": one})
    written(texts, {"b": two})
    written(opened(made, load(here, temperature=1))[1], {"c": three})
    assert fake.proven == [False, False, True, False]


def test_another_pseudo_label_asks_again_about_its_image_only(made: Made, here: Path, fake: Fake) -> None:
    gallery, texts = opened(made, load(here))
    written(texts, by_shard(gallery))
    fake.asked.clear()
    key = gallery.index.filter(pl.col("path") == "003.png")["key"].item()
    gallery.labels[key] = (gallery.labels[key] + 1) % 3
    written(texts, by_shard(gallery))
    assert [(item.paths, item.prompt[:7]) for _, item in fake.asked] == [(("003.png",), "Is it a")]


def test_a_changed_question_asks_just_that_one(made: Made, here: Path, fake: Fake) -> None:
    domain = load(here)
    describe(domain, made.shards, made.embedded)
    group(domain, made.shards, made.embedded)
    fake.asked.clear()
    (here / "own.yaml").write_text(PACK.replace("in common", "not in common").replace("version: 1", "version: 2"))
    domain = load(here)
    assert describe(domain, made.shards, made.embedded).cached and fake.asked == []
    assert not group(domain, made.shards, made.embedded).cached
    assert set(fake.prompts()) == {"What have they not in common?"}
    fake.asked.clear()
    (here / "own.yaml").write_text(PACK.replace("What is it?", "What is this?"))
    assert not describe(load(here), made.shards, made.embedded).cached
    assert set(fake.prompts()) == {"What is this?"} and len(fake.asked) == 11


@pytest.mark.parametrize(
    "other",
    [{"model": "large"}, {"revision": "abc"}, {"max_tokens": 78}, {"temperature": 0.1}, {"structured": True},
     {"longest_px": 512}],
    ids=str,
)  # fmt: skip
def test_texts_of_different_writers_never_mix(made: Made, here: Path, fake: Fake, other: dict[str, Any]) -> None:
    for describer, asked in ((other, 2), ({}, 4), (other, 4)):
        gallery, texts = opened(made, load(here, **describer))
        found = written(texts, {"a": gallery.questions("image", gallery.index["key"].to_list()[:1])})["a"]
        assert set(found["model"]) == {describer.get("model", "tiny")}
        assert set(found["revision"]) == {describer.get("revision", "main")}
        assert len(fake.asked) == asked


def test_where_the_model_runs_does_not_matter(made: Made, here: Path, fake: Fake) -> None:
    describe(load(here), made.shards, made.embedded)
    moved = load(here, url="https://elsewhere/v1", key_env="OTHER", concurrency=2, timeout_s=5, patience_s=7)
    assert describe(moved, made.shards, made.embedded).cached


def test_kinds_of_texts_never_mix(made: Made, here: Path, fake: Fake) -> None:
    gallery, about_images = opened(made, load(here))
    _, about_groups = opened(made, load(here), "group")
    question = {"a": [Question((gallery.index["key"][0],), "What?")]}
    assert written(about_images, question)["a"]["kind"].item() == "image"
    assert written(about_groups, question)["a"]["kind"].item() == "group"


def test_class_texts_have_their_class_and_question(made: Made, here: Path, fake: Fake) -> None:
    domain = load(here)
    result = describe(domain, made.shards, made.embedded)
    table = read_parquet(open_store(domain).open(result.ref).read("classes.parquet"))
    assert table["label"].to_list() == [0, 0, 1, 1, 2, 2] and table["index"].to_list() == [0, 1] * 3
    assert table["prompt"].to_list()[:3] == ["What is a red?", "Describe a red.", "What is a green?"]
    assert table["member_keys"].list.len().sum() == 0
    assert all(text.startswith(prompt) for text, prompt in table.select("text", "prompt").rows())


def test_a_refresh_asks_for_everything_once_more(made: Made, here: Path, fake: Fake) -> None:
    domain = load(here)
    describe(domain, made.shards, made.embedded)
    fake.asked.clear()
    fake.engine = "fake 2"
    with rules(refresh=["describe"]):
        result = describe(domain, made.shards, made.embedded)
    assert len(fake.asked) == 22 + 6
    table = read_parquet(open_store(domain).open(result.ref).read("shard-00000.captions.parquet"))
    assert set(table["engine"]) == {"fake 2"}


def test_a_describer_that_leaves_texts_out_is_found_out(made: Made, here: Path, fake: Fake) -> None:
    fake.leaves_out = 1
    with pytest.raises(EngineStopped, match="left out texts of shard-00000; run again"):
        describe(load(here), made.shards, made.embedded)


def test_seeds_belong_to_the_question_and_fit_any_server(made: Made, here: Path, fake: Fake) -> None:
    gallery, texts = opened(made, load(here, temperature=1))
    written(texts, by_shard(gallery))
    seeds = {(item.paths, item.prompt): item.seed for _, item in fake.asked}
    assert len(set(seeds.values())) == 22 and all(0 <= seed < 2**31 for seed in seeds.values())
    fake.asked.clear()
    alone = opened(made, load(here, temperature=1), objects=ObjectStore(str(here / "another")))[1]
    written(alone, {"a": gallery.questions("image", gallery.index["key"].to_list()[1:2])})
    assert all(seeds[item.paths, item.prompt] == item.seed for _, item in fake.asked) and len(fake.asked) == 2


@settings(max_examples=25)
@given(data=st.data())
def test_each_caption_is_there_once_however_it_was_split_and_killed(
    made: Made, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("split")
    domain = load(made.folder)
    objects = ObjectStore(str(folder))
    gallery = opened(made, domain)[0]
    every = [each for key in gallery.index["key"] for each in gallery.questions("image", [key])]
    places = st.lists(st.integers(0, len(every) - 1), max_size=8)
    parts = {f"part-{n}": [every[p] for p in some] for n, some in enumerate(data.draw(st.lists(places, max_size=5)))}
    kills = data.draw(st.lists(st.integers(0, 24), max_size=3))
    fake = Fake(batch=data.draw(st.integers(1, 7)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latteflow.tasks.describe.texts, "open_describer", lambda *_, proven: fake)
        for kill in kills:
            fake.stop_after = len(fake.asked) + kill
            texts = opened(made, domain, objects=objects)[1]
            with contextlib.suppress(EngineStopped):
                list(texts.write(parts))
        fake.stop_after = None
        tables = written(opened(made, domain, objects=objects)[1], parts)
    assert tables.keys() == parts.keys()
    wanted = {(gallery.digest(each.members[0]), each.prompt) for some in parts.values() for each in some}
    assert len(fake.asked) == len(wanted)  # what was handed on before a stop was never asked again
    captions = CaptionStore(objects)
    stored = [captions.scan(who).collect() for who in captions.describers()]
    rows = pl.concat([pl.DataFrame(schema=CAPTION_SCHEMA), *stored])
    assert sorted(rows.select(pl.col("members").list.first(), "prompt").rows()) == sorted(wanted)
    for name, questions in parts.items():
        assert tables[name]["prompt"].to_list() == [each.prompt for each in questions]
        assert tables[name]["text"].null_count() == 0
        assert tables[name]["member_keys"].list.first().to_list() == [each.members[0] for each in questions]


class Looks:
    """An engine that decodes images in threads, as engines do, and answers with their sizes."""

    version, waited = "looks 1", 0.0

    def __init__(self) -> None:
        self.at_once, self.most = 0, 0
        self.lock = threading.Lock()

    def generate(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Text]]:
        with self.lock:
            self.at_once += 1
            self.most = max(self.most, self.at_once)
        try:
            with ThreadPoolExecutor(4) as pool:
                for place, decoding in enumerate([pool.submit(prompt.images) for prompt in prompts]):
                    time.sleep(0.002)
                    try:
                        shown = " ".join(f"{image.mode} {image.size}" for image in decoding.result())
                    except EngineStopped:
                        raise
                    except Exception as why:
                        yield place, Text.failed(why)
                    else:
                        yield place, Text(shown)
        finally:
            with self.lock:
                self.at_once -= 1


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Looks:
    found = Looks()
    monkeypatch.setattr(latteflow.tasks.describe.texts, "_open_engine", lambda settings: found)
    return found


def test_a_damaged_shard_is_no_fault_of_its_images(made: Made, here: Path, looks: Looks) -> None:
    domain = load(here)
    artifact = open_store(domain).open(made.shards.ref)
    (tar,) = (path for path in (here / "store").rglob("*.tar") if path.read_bytes() == artifact.read("shard-00001.tar"))
    tar.write_bytes(tar.read_bytes().replace(b"IDAT", b"IDOT"))
    with pytest.raises(Damaged, match="shard-00001"):
        describe(domain, made.shards, made.embedded)
    captions = CaptionStore(ObjectStore(str(here / "store")))
    rows = pl.concat([captions.scan(who).collect() for who in captions.describers()])
    assert rows.height > 0 and set(rows["finish_reason"]) == {"stop"}


def test_stages_side_by_side_take_turns_with_one_model(made: Made, here: Path, looks: Looks) -> None:
    domain = load(here)
    with ThreadPoolExecutor(2) as pool:
        works = [pool.submit(stage, domain, made.shards, made.embedded) for stage in (describe, group)]
        assert [work.result().counts["flagged"] for work in works] == [0, 0]
    assert looks.most == 1


def test_images_are_kept_decoded(made: Made, here: Path) -> None:
    gallery, _ = opened(made, load(here))
    assert len(gallery.paths) == 12
    assert not any(getattr(gallery._opened(row), "tile", None) for row in range(12))  # what Pillow has yet to decode


def test_threads_may_share_an_image_and_none_is_larger_than_shown(made: Made, here: Path) -> None:
    gallery, _ = opened(made, load(here, longest_px=32))
    question = Question(tuple(gallery.index["key"].to_list()[:4]), "?")
    for _ in range(5):
        gallery._opened.cache_clear()
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda _: gallery.item(question, 0).images(), range(8)))
        assert all(image.size == (32, 26) and image.mode == "RGB" for images in found for image in images)
        assert len({b"".join(image.tobytes() for image in images) for images in found}) == 1
    found[0][0].paste("black", (0, 0, 32, 26))  # a copy
    assert gallery.item(question, 0).images()[0].tobytes() == found[1][0].tobytes()


def test_a_group_is_shown_as_the_domain_says(made: Made, here: Path, looks: Looks) -> None:
    for view, shown in (("collage", "RGB (672, 672)"), ("images", " ".join(["RGB (40, 32)"] * 3))):
        domain = load(here, group=f"{{view: {view}, size: 3}}")
        made_of = open_store(domain).open(group(domain, made.shards, made.embedded).ref)
        table = read_parquet(made_of.read("groups.parquet"))
        several = table.filter(pl.col("member_keys").list.len() == 3)
        assert several.height and set(several["text"]) == {shown}


def key_of(monkeypatch: pytest.MonkeyPatch, domain: Domain) -> str | None:
    from latteflow.models.texts.describers import openai

    got: list[str | None] = []
    monkeypatch.setattr(openai, "OpenAIEngine", lambda settings, key: got.append(key))
    latteflow.tasks.describe.texts._open_engine(domain.describer)  # type: ignore[arg-type]
    return got[0]


def test_the_key_comes_from_the_environment(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "one")
    monkeypatch.setenv("OTHER", "two")
    assert key_of(monkeypatch, load(tmp_path)) == "one"
    assert key_of(monkeypatch, load(tmp_path, key_env="OTHER")) == "two"
    assert key_of(monkeypatch, load(tmp_path, key_env="NONE_SUCH")) is None


def test_the_key_comes_from_a_prefect_block(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def secret(name: str, _sync: bool) -> Any:
        if name != "mine":
            raise {"gone": ValueError("no such block"), "away": ConnectionError("no server")}[name]
        return SimpleNamespace(get=lambda: "from the block")

    monkeypatch.setitem(sys.modules, "prefect.blocks.system", SimpleNamespace(Secret=SimpleNamespace(load=secret)))
    monkeypatch.setenv("OPENAI_API_KEY", "not this one")
    assert key_of(monkeypatch, load(tmp_path, key_block="mine")) == "from the block"
    for name, why in (("gone", "no such block"), ("away", "no server")):
        with pytest.raises(ModelError, match=rf"`key_block: {name}`: .*\({why}\); create it, or use `key_env`"):
            key_of(monkeypatch, load(tmp_path, key_block=name))


KEY = "sk-of-the-whole-pipeline-0123456789"


def test_the_whole_pipeline_asks_a_server_and_keeps_its_key_to_itself(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def script(ask: Ask) -> Reply:
        if ask.headers["Authorization"] != f"Bearer {KEY}":
            return error(401)
        if ask.attempt == 0 and len(server.asked) % 5 == 0:
            return error(500, f"at {KEY}")
        if ask.images and Image.open(io.BytesIO(ask.images[0])).size == (672, 672):
            return error(400, f"{KEY} may not ask this") if len(server.asked) % 4 == 0 else answer("They are alike.")
        return answer("Half a \ud83d shape\x00 of\n\x1b[31m colour. " * 300, "length")

    server = ChatServer()
    server.script = script
    monkeypatch.setenv("MY_KEY", f"{KEY}\n")
    monkeypatch.setattr("latteflow.models.texts.describers.openai.LONGEST_WAIT_S", 0.02)
    here = {"url": server.url, "key_env": "MY_KEY", "concurrency": 3, "timeout_s": 20, "patience_s": 20}
    try:
        domain = load(tmp_path, **here)
        results = {result.label: result for result in run_plainly(domain)}
        assert server.most_at_once <= 3
        assert results["describe"].counts["flagged"] == results["describe"].counts["texts"] == 24  # all are cut
        failed = results["group"].counts["flagged"]
        assert 0 < failed < 12
        asked = len(server.asked)
        run_plainly(load(tmp_path, name="other", **here))
        again = {ask.images[0] for ask in server.asked[asked:]}
        assert len(again) <= failed  # of all texts, the other domain asks for the groups that had none
    finally:
        server.close()
    captions = CaptionStore(ObjectStore(domain.store))
    rows = pl.concat([captions.scan(who).collect() for who in captions.describers()])
    assert {"server of version 0.0-fake"} == set(rows["engine"])
    assert "may not ask this" in "".join(rows["detail"]) and "***" in "".join(rows["detail"])
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 50 and not [path for path in files if KEY[3:].encode() in path.read_bytes()]
    tables = [path for path in files if path.suffix == ".parquet"]  # these are compressed
    assert len(tables) > 10 and not [path for path in tables if KEY[3:] in str(pl.read_parquet(path).to_dicts())]
