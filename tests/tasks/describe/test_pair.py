"""Texts about pairs: drawn, written once, filtered by named rules; and what is said when nothing can be used."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from chatserver import Ask, ChatServer, Reply, answer, error
from conftest import draw
from latteflow.flows.pipeline import graph, run_plainly
from latteflow.flows.plan import plan
from latteflow.models.methods.registry import METHODS
from latteflow.models.texts.differences import RULES
from latteflow.storage.errors import DataError
from latteflow.storage.shards import read_index
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.errors import ConfigError
from latteflow.tasks.core.stage import StageResult, open_store, statistic
from latteflow.tasks.describe.pair import read_class_pairs, read_pairs
from latteflow.tasks.report.evaluate import evaluate
from latteflow.tasks.ship.export import export_tuned
from latteflow.tasks.tune.models import read_history, read_tuned, text_reader

pytestmark = pytest.mark.slow

PC_CLIP = "method: [pc_clip]\npc_clip: {lr: 0.001, batch_size: 16, epochs: 2}\n"


def change(domain: Domain, tmp_path: Path, more: str = "", old: str = "", new: str = "") -> Domain:
    path = tmp_path / "domain.yaml"
    text = path.read_text()
    assert old in text
    kept = text.replace("method: [latteclip]\n", "") if "method:" in more else text
    path.write_text(kept.replace(old, new, 1) + more)
    return Domain.load(path)


def made(domain: Domain, **options: Any) -> dict[str, StageResult]:
    return {result.label: result for result in run_plainly(domain, **options)}


def pairs_of(domain: Domain, results: dict[str, StageResult]) -> pl.DataFrame:
    return read_pairs(open_store(domain).open(results["pair"].ref))


def test_words_are_compared_where_there_is_no_language_model(domain: Domain, tmp_path: Path) -> None:
    domain = change(domain, tmp_path, PC_CLIP + "pairs: {budget: 100}\n")
    results = made(domain)
    table = pairs_of(domain, results)
    assert table.height == 100 == results["pair"].counts["texts"] == results["pair"].counts["kept"]
    assert table["pair_id"].n_unique() == 100 and set(table["model"]) == {"words"}
    assert 0.3 < (table["first"] < table["second"]).mean() < 0.7
    row = table.row(0, named=True)
    index = read_index(open_store(domain).open(results["shard train"].ref))
    first, second = (
        index.filter(pl.col("key") == row[name])["path"].item().removesuffix(".png") for name in ("first", "second")
    )
    assert row["raw"].index(first) < row["raw"].index(second) and row["raw"].startswith("The first image shows")
    assert row["text"] == row["raw"] and row["status"] == "kept" and row["rule"] is None
    hard = table.filter("is_hard")
    assert 0 < hard.height <= 50


def test_a_domain_without_pc_clip_has_no_such_stage(domain: Domain) -> None:
    assert "pair" not in made(domain)
    with pytest.raises(ConfigError, match="needs the stage 'pair'; pc_clip does"):
        run_plainly(domain, only="pair")


def test_the_model_is_scored_shown_and_exported(domain: Domain, tmp_path: Path) -> None:
    domain = change(domain, tmp_path, PC_CLIP + "pairs: {budget: 60, class_pairs: 1}\n")
    results = made(domain)
    store, folder = open_store(domain), Path(domain.output) / "shapes"
    about = read_class_pairs(store.open(results["pair"].ref))
    assert about.height == 2 and about.row(0)[-2:] == about.row(1)[-2:][::-1]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert list(metrics["methods"]) == ["pc_clip"] and len(metrics["methods"]["pc_clip"]["seeds"]) == 2
    page = (folder / "report.html").read_text()
    assert "<bdi>PC-CLIP</bdi>" in page and "60 texts, of which 60 are used" in page
    files = store.open(results["tune"].ref)
    found = read_tuned(files, "pc_clip", 0)
    assert found.towers and all(name.startswith("transformer.resblocks") for name in found.towers)
    assert "cosine" in read_history(files, "pc_clip", 1)[-1]
    export_tuned(domain, results["tune"], 0, tmp_path / "model")
    assert (tmp_path / "model" / "classifier.safetensors").exists()
    # The second run has everything, and images were read for features once.
    assert all(result.cached for result in made(domain).values())


def test_what_changes_a_model_and_what_does_not(domain: Domain, tmp_path: Path) -> None:
    domain = change(domain, tmp_path, PC_CLIP.replace("pc_clip]", "pc_clip, latteclip]", 1) + "pairs: {budget: 60}\n")

    def trained(more: str = "", old: str = "", new: str = "") -> int:
        nonlocal domain
        domain = change(domain, tmp_path, more, old, new)
        planned = {each.label: each for each in plan(domain)}["tune"].work
        result = made(domain)["tune"]
        artifact = open_store(domain).open(result.ref)
        done = int(statistic(open_store(domain), artifact, "parts_made") or 0)
        assert planned == done
        return done

    assert trained() == 4
    assert trained(old="batch_size: 16", new="batch_size: 8") == 2
    assert trained(old="latteclip: {epochs: 2", new="latteclip: {epochs: 3") == 2
    assert trained(old="pairs: {budget: 60", new="pairs: {budget: 50") == 2
    assert trained(old="latteclip: {epochs: 3", new="latteclip: {texts_from: pc_clip, epochs: 3") == 2
    assert trained(old="batch_size: 8, epochs: 2}\npairs", new="batch_size: 8, epochs: 1}\npairs") == 4


@pytest.mark.parametrize("train", ["blocks", "projection"])
def test_latteclip_reads_its_texts_with_the_tuned_tower(domain: Domain, tmp_path: Path, train: str) -> None:
    more = PC_CLIP.replace("pc_clip]", "latteclip, pc_clip]", 1).replace("lr:", f"train: {train}, lr:")
    domain = change(domain, tmp_path, more + "pairs: {budget: 60}\n")
    plain = made(domain)
    domain = change(domain, tmp_path, old="latteclip: {", new="latteclip: {texts_from: pc_clip, lr: 0, ")
    results = made(domain)
    files = open_store(domain).open(results["tune"].ref)
    own, tower = read_tuned(files, "latteclip", 1), read_tuned(files, "pc_clip", 1)
    before = read_tuned(open_store(domain).open(plain["tune"].ref), "latteclip", 1)
    assert abs(own.prototypes - before.prototypes).max() > 1e-4
    texts = ["a red shape.", "a blue shape."]
    read = [text_reader(domain, each).text_features(texts) for each in (own, tower)]
    assert abs(read[0] - read[1]).max() < 1e-5


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("method: [latteclip]\nlatteclip: {texts_from: pc_clip}", "add pc_clip to `method`"),
        ("method: [pc_clip]\nlatteclip: {texts_from: pc_clip}", "no method reads texts"),
        ("pairs: {describer: {kind: tags}}", r"line 4: `pairs.describer.kind` 'tags' is none of"),
        ("pairs: {describer: {kind: openai, url: 'http://a', modle: x}}", r"modle.*unknown key; did you mean `model`"),
        ("pairs: {budget: 0}", "greater than or equal to 1"),
        ("pc_clip: {batch_size: 1}", "greater than or equal to 2"),
    ],
)
def test_mistakes_are_told_before_anything_runs(tmp_path: Path, lines: str, message: str) -> None:
    (tmp_path / "domain.yaml").write_text(f"name: x\nsource: a\nclasses: [a, b]\n{lines}\n")
    with pytest.raises(ConfigError, match=message):
        Domain.load(tmp_path / "domain.yaml")


@pytest.fixture
def chat_server() -> Iterator[ChatServer]:
    found = ChatServer()
    yield found
    found.close()


# --- a language model -------------------------------------------------------------------------------------------------


def asked(domain: Domain, tmp_path: Path, server: ChatServer, more: str = "", budget: int = 40) -> Domain:
    describer = f"{{kind: openai, url: '{server.url}', model: tiny, patience_s: 1}}"
    return change(domain, tmp_path, PC_CLIP + f"pairs: {{budget: {budget}, {more}describer: {describer}}}\n")


def good(ask: Ask) -> Reply:
    told = [part.split('"')[0] for part in ask.prompt.split('description of "')[1:]]
    return answer(f"The first image has {told[0]} in its middle, while the second image has {told[1]} there.")


def test_a_language_model_sees_two_descriptions_and_no_image(
    domain: Domain, tmp_path: Path, chat_server: ChatServer
) -> None:
    asks: list[Ask] = []

    def script(ask: Ask) -> Reply:
        asks.append(ask)
        return [
            good(ask),
            answer("I'm sorry, but I cannot compare images that I do not see, please send them."),
            error(400),
        ][len(asks) % 3]

    chat_server.script = script
    domain = asked(domain, tmp_path, chat_server, "both_directions: true, ")
    results = made(domain)
    table = pairs_of(domain, results)
    assert len(asks) == 40 == table.height and not any(ask.images for ask in asks)
    assert all('description of "a ' in ask.prompt and "at most 40 words" in ask.prompt for ask in asks)
    counts = results["pair"].counts
    page = (Path(domain.output) / "shapes" / "report.html").read_text()
    assert f"40 texts, of which {counts['kept']} are used" in page and RULES["refusal"] in page
    assert counts["kept"] + counts["rejected_refusal"] + counts["rejected_error"] == 40
    assert abs(counts["kept"] - 13) <= 1 and set(table["rule"].drop_nulls()) <= RULES.keys()
    both = {(first, second) for first, second in table.select("first", "second").iter_rows()}
    assert {(second, first) for first, second in both} == both
    assert set(table.filter(pl.col("status") == "kept")["model"]) == {"tiny"}
    # Another filter asks for nothing but what failed.
    chat_server.script = script
    asks.clear()
    domain = change(domain, tmp_path, old="both_directions: true", new="both_directions: true, filter: compat")
    again = made(domain)
    assert len(asks) == counts["rejected_error"] and again["pair"].counts["texts"] == 40


@pytest.mark.parametrize(
    ("text", "filter", "message"),
    [
        ("I'm sorry, but I cannot compare images that I do not see, please send them to me.", "recommended",
         r"first 40 texts about pairs 0 can be used: 40 refusal \(the model declines to answer\); for example \"I'm"),
        (20 * "the first image is ", "recommended", r"40 loop \(says the same over and over\)"),
        ("Das erste Bild zeigt eine größere Fläche als das zweite, und sie ist auch heller.", "compat",
         r"40 not_ascii .*`pairs.filter: compat` reads English only"),
    ],
)  # fmt: skip
def test_a_model_that_never_gives_a_usable_text(
    domain: Domain, tmp_path: Path, chat_server: ChatServer, text: str, filter: str, message: str
) -> None:
    asks: list[Ask] = []

    def script(ask: Ask) -> Reply:
        asks.append(ask)
        return answer(text)

    chat_server.script = script
    domain = asked(domain, tmp_path, chat_server, f"filter: {filter}, ")
    for _ in range(2):  # and it is not asked again
        with pytest.raises(DataError, match=message):
            made(domain)
        assert len(asks) == 40


def test_a_hopeless_model_is_not_asked_about_everything(
    domain: Domain, tmp_path: Path, chat_server: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("latteflow.tasks.describe.pair.PART", 20)
    monkeypatch.setattr("latteflow.tasks.describe.pair.HOPELESS", 40)
    monkeypatch.setattr("latteflow.models.texts.describers.prompted.BATCH_S", 0.0)
    asks: list[Ask] = []

    def script(ask: Ask) -> Reply:
        asks.append(ask)
        return answer("No.")

    chat_server.script = script
    domain = asked(domain, tmp_path, chat_server, budget=250)
    with pytest.raises(DataError, match=r"texts about pairs 0 can be used.*too_short"):
        made(domain)
    assert 40 <= len(asks) < 200


def test_descriptions_that_all_say_the_same(domain: Domain, tmp_path: Path) -> None:
    lines = (tmp_path / "texts.csv").read_text().splitlines()
    (tmp_path / "texts.csv").write_text("\n".join([lines[0], *(f"{line.split(',')[0]},a shape" for line in lines[1:])]))
    domain = change(domain, tmp_path, PC_CLIP)
    with pytest.raises(
        DataError, match=r"all \d+ descriptions say the same .'a shape'.*a describer that tells the images apart"
    ):
        made(domain)


def test_fewer_than_two_descriptions(domain: Domain, tmp_path: Path) -> None:
    lines = (tmp_path / "texts.csv").read_text().splitlines()
    (tmp_path / "texts.csv").write_text("\n".join(lines[:2]))
    domain = change(domain, tmp_path, PC_CLIP)
    with pytest.raises(DataError, match=r"1 image\(s\) with a description that is used, and pairs need 2"):
        made(domain)


def test_descriptions_in_another_language_are_told(
    domain: Domain, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = (tmp_path / "texts.csv").read_text().replace("shape number", "Form mit der Nummer und der Farbe")
    (tmp_path / "texts.csv").write_text(text)
    domain = change(domain, tmp_path, PC_CLIP + "pairs: {filter: compat}\nscreen: {language: any}\n")
    with caplog.at_level(logging.WARNING, "latteflow.tasks"):
        made(domain)
    assert " descriptions do not look English; the filter `compat` is for English" in caplog.text


def test_a_new_image_asks_about_its_own_pairs_only(domain: Domain, tmp_path: Path, chat_server: ChatServer) -> None:
    asks: list[Ask] = []

    def script(ask: Ask) -> Reply:
        asks.append(ask)
        return good(ask)

    chat_server.script = script
    domain = asked(domain, tmp_path, chat_server, budget=100)
    made(domain)
    assert len(asks) == 100
    asks.clear()
    draw(400, "red").save(tmp_path / "train" / "400.png")
    with (tmp_path / "texts.csv").open("a") as file:
        file.write("train/400.png,a red shape that is new\n")
    made(domain)
    # Pseudo-labels are relative to the mean image, so a few others may move to another class.
    assert 0 < len(asks) < 50


def test_pairs_are_part_of_a_flow_of_prefect(domain: Domain) -> None:
    steps = graph(domain.model_copy(update={"method": ["pc_clip"]}))
    names = [step.name for step in steps]
    assert names.index("screen") < names.index("pair") < names.index("tune")
    assert "pc_clip" in METHODS and evaluate.__name__ in names
