"""screen: the stage between the describers and training."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from conftest import draw
from latteflow.flows.pipeline import run_plainly
from latteflow.models.settings import TagsSettings
from latteflow.storage.tables import parquet, read_parquet
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.errors import ConfigError
from latteflow.tasks.core.features import read_features
from latteflow.tasks.core.stage import StageResult, open_store
from latteflow.tasks.describe import screen as stage
from latteflow.tasks.describe.describe import describe
from latteflow.tasks.describe.group import group
from latteflow.tasks.describe.screen import read_screened, screen, usable
from latteflow.tasks.ingest.embed import embed
from latteflow.tasks.ingest.shard import shard
from latteflow.tasks.report import report

pytestmark = pytest.mark.slow

COLUMNS = [
    "caption_key",
    "member_keys",
    "index",
    "label",
    "text",
    "detail",
    "flags",
    "weight",
    "clip_score",
    "clip_score_shuffled",
]


def before(domain: Domain) -> tuple[StageResult, StageResult, StageResult, StageResult]:
    images = shard(domain, "train")
    features = embed(domain, images)
    return images, features, describe(domain, images, features), group(domain, images, features)


def changed(domain: Domain, **settings: object) -> Domain:
    return domain.model_copy(update={"screen": domain.screen.model_copy(update=settings)})


def read(domain: Domain, result: StageResult, kind: str) -> pl.DataFrame:
    return read_screened(open_store(domain).open(result.ref), kind)


def rewritten(domain: Domain, result: StageResult, change: Callable[[pl.DataFrame], pl.DataFrame]) -> StageResult:
    """The artifact of a describer that wrote other tables."""
    store = open_store(domain)
    old = store.open(result.ref)
    writer = store.writer(domain.name, old.stage, 99, {})
    for name in old.names(".parquet"):
        writer.put(name, {"file": name}, {name: parquet(change(read_parquet(old.read(name))))})
    return StageResult(writer.finish({}, {}).ref, old.stage, False, 0.0, {})


def with_texts(domain: Domain, tmp_path: Path, texts: dict[str, str]) -> None:
    lines = (tmp_path / "texts.csv").read_text().splitlines()
    rows = dict(line.split(",", 1) for line in lines[1:])
    rows |= {f"train/{name}": text for name, text in texts.items()}
    frame = pl.DataFrame({"path": list(rows), "text": list(rows.values())})
    frame.write_csv(tmp_path / "texts.csv")


def test_every_text_keeps_its_row_and_gets_flags_and_a_weight(domain: Domain, tmp_path: Path) -> None:
    with_texts(
        domain,
        tmp_path,
        {"000.png": "", "001.png": "I'm sorry, but I can't assist with that.", "002.png": "a hat and " * 15},
    )
    stages = before(domain)
    result = screen(domain, *stages)
    images, groups = read(domain, result, "images"), read(domain, result, "groups")
    assert images.columns == groups.columns == COLUMNS
    assert images.schema["weight"] == pl.Float32 and images.height == groups.height == 24
    described = open_store(domain).open(stages[2].ref)
    texts = pl.concat([read_parquet(described.read(name)) for name in described.names(".captions.parquet")])
    assert images["caption_key"].to_list() == texts["caption_key"].to_list()
    dropped = images.filter(pl.col("weight") == 0)
    found = {tuple(flags) for flags in dropped["flags"].to_list()}
    assert {("missing", "empty"), ("refusal",), ("loop", "beyond_context")} <= found
    assert result.counts["texts"] == 48 and result.counts["images"] == 24
    assert result.counts["dropped"] == dropped.height + groups.filter(pl.col("weight") == 0).height
    assert images.filter(pl.col("text") == "")["clip_score"].null_count() == 1
    assert result.counts["flagged"] == sum(map(bool, [*images["flags"].to_list(), *groups["flags"].to_list()]))


def test_scores_are_cosines_with_the_members(domain: Domain) -> None:
    from latteflow.models.towers import clip

    stages = before(domain)
    result = screen(domain, *stages)
    found = read_features(open_store(domain).open(stages[1].ref))
    place = {key: row for row, key in enumerate(found.keys)}
    for kind in ("images", "groups"):
        rows = read(domain, result, kind)
        features = clip.load(domain.clip).text_features(rows["text"].to_list())
        for row, text in zip(rows.iter_rows(named=True), features, strict=True):
            mean = found.features[[place[key] for key in row["member_keys"]]].mean(axis=0)
            assert row["clip_score"] == pytest.approx(float(text @ mean / np.linalg.norm(mean)), abs=1e-5)
            assert row["label"] == found.zero_shot[place[row["member_keys"][0]]]


def test_a_second_time_is_cached_and_settings_make_it_run(domain: Domain) -> None:
    stages = before(domain)
    first = screen(domain, *stages)
    assert not first.cached and screen(domain, *stages).cached
    assert not screen(changed(domain, floor=2), *stages).cached
    assert not screen(domain.model_copy(update={"classes": ["red", "green", "grey"]}), *stages).cached


def test_a_killed_stage_takes_up_its_finished_part(domain: Domain, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = before(domain)
    calls = []
    screened = stage.screened

    def once(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return screened(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(stage, "screened", once)
    with pytest.raises(KeyboardInterrupt):
        screen(domain, *stages)
    screen(domain, *stages)
    assert len(calls) == 3


def test_too_long_is_what_the_clips_own_tokenizer_cuts(domain: Domain) -> None:
    import torch

    from latteflow.models.towers import clip

    texts = ["", "a " * 10, "a " * 37, "a " * 38, "a " * 60, "猫" * 30]  # 40 tokens, two of them begin and end
    assert clip.load(domain.clip).too_long(texts).tolist() == [False, False, False, True, True, True]

    def to_the_longest(texts: list[str]) -> torch.Tensor:
        rows = [[1, *(7 for _ in text.split())][:24] for text in texts]
        return torch.tensor([row + [0] * (max(map(len, rows)) - len(row)) for row in rows])

    other = replace(clip.load(domain.clip), tokenizer=to_the_longest)
    assert other.too_long(["b", "b " * 20, "b " * 22, "b " * 23]).tolist() == [False, False, False, True]
    assert other.too_long(["b " * 20]).tolist() == [False]


def test_of_several_texts_training_uses_the_heaviest_then_the_first(domain: Domain) -> None:
    images, features, described, grouped = before(domain)

    def three(table: pl.DataFrame) -> pl.DataFrame:
        # Keys and columns as another describer may write them.
        each = [
            table.with_columns(
                index=pl.lit(index), prompt=pl.lit("p"), caption_key=pl.col("caption_key") + f"-{index}",
                text=pl.col("text") + f" version {index}",
            )
            for index in (2, 0, 1)
        ]  # fmt: skip
        table = pl.concat(each)
        number = pl.int_range(pl.len()) % 3
        return table.with_columns(
            finish_reason=pl.when((pl.col("index") == 0) & (number == 0))
            .then(pl.lit("length"))
            .otherwise(pl.lit("stop"))
        )

    several = rewritten(domain, described, three)
    result = screen(changed(domain, clip_margin=100), images, features, several, grouped)
    rows = read(domain, result, "images")
    assert rows.height == 72
    rows = rows.with_columns(
        flags=pl.lit([], pl.List(pl.String)),
        weight=pl.when(pl.col("flags").list.contains("cut")).then(0.8).otherwise(1.0),
    )
    used = usable(rows)
    assert used.height == 24
    cut = set(rows.filter((pl.col("index") == 0) & (pl.col("weight") < 1))["member_keys"].list.first())
    assert cut
    for row in used.iter_rows(named=True):
        assert row["index"] == (1 if row["member_keys"][0] in cut else 0)
    assert usable(rows.with_columns(weight=pl.lit(0.0))).height == 0


def test_dropped_texts_do_not_reach_training(domain: Domain, tmp_path: Path) -> None:
    from latteflow.models.methods.registry import METHODS
    from latteflow.models.towers import clip
    from latteflow.tasks.tune.inputs import Inputs, Stages

    refusal = "I'm sorry, but I can't assist with that."
    with_texts(domain, tmp_path, {"001.png": refusal})
    images, features, *texts = before(domain)
    screened = screen(domain, images, features, *texts)
    store = open_store(domain)
    data = Inputs(domain, Stages(images, features, screened)).of(METHODS["latteclip"])
    assert data.image_texts is not None and data.has_image_text is not None and data.group_texts is not None
    rows = {
        keys[0]: (text, weight)
        for keys, text, weight in read(domain, screened, "images").select("member_keys", "text", "weight").iter_rows()
    }
    keys = read_features(store.open(features.ref)).keys
    assert data.has_image_text.tolist() == [rows[key][1] > 0 for key in keys]
    refused = next(row for row, key in enumerate(keys) if rows[key][0] == refusal)
    assert not data.has_image_text[refused]
    used = [row for row in range(24) if data.has_image_text[row]]
    expected = clip.load(domain.clip).text_features([rows[keys[row]][0] for row in used])
    assert np.allclose(data.image_texts.numpy()[used], expected, atol=1e-5)
    assert len(data.group_texts) == read(domain, screened, "groups").filter(pl.col("weight") > 0).height
    # What `tags` reads off the features is no second opinion about an image.
    by_tags = Inputs(domain.model_copy(update={"describer": TagsSettings()}), Stages(images, features, screened))
    assert data.independent_texts and not by_tags.of(METHODS["latteclip"]).independent_texts


def test_a_run_with_nothing_but_empty_texts_still_trains(domain: Domain, tmp_path: Path) -> None:
    with_texts(domain, tmp_path, {f"{row:03}.png": "?" if row else "x" for row in range(24)})
    results = {result.label: result for result in run_plainly(domain)}
    assert results["screen"].counts["dropped"] >= 46 and results["tune"].counts["models"] == 2


def test_a_lone_image_is_screened(domain: Domain, tmp_path: Path) -> None:
    for path in sorted((tmp_path / "train").iterdir())[1:]:
        path.unlink()
    result = screen(domain, *before(domain))
    images = read(domain, result, "images")
    assert images["clip_score_shuffled"].to_list() == [None] and images["weight"].to_list() == [1.0]


def test_copies_of_an_image_do_not_make_its_text_identical(domain: Domain, tmp_path: Path) -> None:
    for copy in range(8):
        draw(1, "green").save(tmp_path / "train" / f"copy{copy}.png")
    with_texts(domain, tmp_path, {f"copy{copy}.png": "one and the same" for copy in range(8)})
    images = read(domain, screen(domain, *before(domain)), "images")
    assert not any("identical" in flags for flags in images["flags"].to_list())


def test_settings_are_checked(domain: Domain, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(
        (tmp_path / "domain.yaml").read_text() + "screen: {langage: en, identical: 2, floor: 0}\n"
    )
    with pytest.raises(ConfigError, match=r"3 mistake\(s\)") as caught:
        Domain.load(tmp_path / "bad.yaml")
    assert "did you mean `language`?" in str(caught.value)


def page_of(domain: Domain) -> str:
    return (Path(domain.output) / domain.name / "report.html").read_text()


def test_the_report_shows_every_dropped_text_beside_its_image(
    domain: Domain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals = {f"{row:03}.png": f"I'm sorry, but I can't help with number {row}." for row in range(6)}
    with_texts(domain, tmp_path, refusals)
    run_plainly(domain)
    html = page_of(domain)
    for text in refusals.values():
        assert html.count(text.replace("'", "&#39;")) >= 1
    assert html.count("data-state=") >= 24 + 15, "all images, and of the groups those with a dropped text and some"
    monkeypatch.setattr(report, "CAPTIONED_DROPPED", {"images": 4, "groups": 1})
    monkeypatch.setattr(report, "CAPTIONED_OTHERS", {"images": 3, "groups": 2})
    run_plainly(domain, refresh=["report"])
    html = page_of(domain)
    assert html.count('data-state="dropped"') <= 5 and html.count("data-state=") <= 10
    assert "Shown are 4 of " in html or "Shown are 5 of " in html
    first = html
    run_plainly(domain, refresh=["report"])
    assert cards(page_of(domain)) == cards(first)


def test_where_there_is_no_text_the_report_says_why(domain: Domain) -> None:
    images, features, described, grouped = before(domain)
    reason = "the image is 3 pixels, 28 are needed"
    failed = rewritten(
        domain,
        described,
        lambda table: table.with_columns(
            text=pl.lit(""), detail=pl.lit(reason), finish_reason=pl.lit("error"), flags=pl.lit([], pl.List(pl.String))
        ),
    )
    rows = read(domain, screen(domain, images, features, failed, grouped), "images")
    assert (rows["weight"] == 0).all() and rows["detail"].unique().to_list() == [reason]


def cards(html: str) -> str:
    return html[html.index('id="captions"') : html.index('class="more-cards"')]


def test_the_report_says_what_each_flag_does() -> None:
    effects = [report._effect(name) for name in ("refusal", "cut", "names_class", "kept_by_floor", "odd")]
    assert effects == ["dropped", "weight × 0.8", "", "weight 0.1", ""]


def test_the_report_tells_how_long_the_engine_waited(domain: Domain) -> None:
    results = {result.label: result for result in run_plainly(domain)}
    assert "engine waiting" not in page_of(domain)
    ref = results["describe"].ref
    file = Path(domain.store) / domain.name / "describe" / ref.fingerprint / "stats.json"
    for value, said in ((0.25, True), ("x", False), (1.5, False)):
        file.write_text(json.dumps({**json.loads(file.read_text()), "engine_wait": value}))
        run_plainly(domain, refresh=["report"])
        assert ("engine waiting for images 25% of the time" in page_of(domain)) == said
