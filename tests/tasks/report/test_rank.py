"""rank: images in the order of an attribute, printed and on a page; and attributes that are none."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from conftest import call
from latteflow.flows.pipeline import run_plainly
from latteflow.storage.errors import DataError
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.features import centred, read_features
from latteflow.tasks.core.stage import open_store
from latteflow.tasks.report.rank import rank, sentence
from latteflow.tasks.tune.models import read_tuned, text_reader, tuned_features

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("attribute", ["larger", "larger shape", "longer sleeves", "with a hat", "red and round"])
def test_an_attribute_becomes_a_sentence_about_a_difference(attribute: str) -> None:
    told = f"The first image shows this, while the second image does not: {attribute}."
    assert sentence(f" {attribute}. ") == told
    own = "The first animal is larger than the second."
    assert sentence(own) == own


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("", "the attribute is empty"),
        (" \n", "the attribute is empty"),
        (10_000 * "x", r"has 10,000 characters, at most"),
    ],
)
def test_an_attribute_that_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], attribute: str, message: str
) -> None:
    assert call("rank", tmp_path / "no-such-domain.yaml", attribute) == 1
    said = capsys.readouterr().err
    assert re.search(message, said) and "Traceback" not in said and len(said) < 400


def test_words_that_the_clip_does_not_read_to_the_end(domain: Domain) -> None:
    results = {each.label: each for each in run_plainly(domain)}
    made_from = results["shard train"], results["embed train"], results["tune"]
    with pytest.raises(DataError, match="longer than the CLIP reads"):
        rank(domain, *made_from, "red and green and blue and round " * 5)
    with pytest.raises(DataError, match="no model by 'pc_clip'"):
        rank(domain, *made_from, "red", method="pc_clip")


def test_a_ranking_is_a_sort_by_one_projection(domain: Domain, tmp_path: Path) -> None:
    more = "method: [latteclip, pc_clip]\npc_clip: {train: projection, epochs: 1}\npairs: {budget: 50}\n"
    plain = (tmp_path / "domain.yaml").read_text().replace("method: [latteclip]\n", "")
    (tmp_path / "domain.yaml").write_text(plain + more)
    domain = Domain.load(tmp_path / "domain.yaml")
    results = {each.label: each for each in run_plainly(domain)}
    store = open_store(domain)
    made_from = results["shard train"], results["embed train"], results["tune"]
    found = read_features(store.open(results["embed train"].ref))
    images, models = store.open(results["shard train"].ref), store.open(results["tune"].ref)
    seen = []
    for method, seed in (("pc_clip", 1), ("latteclip", 0), ("zero_shot", None)):
        ranked = rank(domain, *made_from, "red", method=method, seed=seed)
        if method == "zero_shot":
            features, reader = centred(found.embeds, np.zeros_like(found.centre)), None
        else:
            model = read_tuned(models, method, seed)  # type: ignore[arg-type]
            features, reader = tuned_features(domain, model, images, found), text_reader(domain, model)
        place = {key: row for row, key in enumerate(found.keys)}
        ordered = features[[place[key] for key in ranked.keys]]
        if reader is not None:
            np.testing.assert_allclose(ordered @ reader.text_features([ranked.sentence])[0], ranked.values, atol=1e-5)
        assert len(ranked.keys) == 24 and (np.diff(ranked.values) <= 0).all() and ranked.method == method
        seen.append(tuple(ranked.values))
    assert len(set(seen)) == 3
    assert rank(domain, *made_from, "red").method == "pc_clip"


def test_the_command_prints_and_writes_a_page(
    domain: Domain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my").mkdir()
    assert call("rank", tmp_path / "domain.yaml", "red <b>", "--top", 3, "--out", tmp_path / "my" / "order.html") == 0
    said = capsys.readouterr().out
    assert (
        "The first image shows this, while the second image does not: red <b>." in said
        and f"page     {tmp_path / 'my' / 'order.html'}" in said
    )
    assert [int(place) for place in re.findall(r"^ *(\d+) +[+-]0\.\d{3} ", said, re.MULTILINE)] == [1, 2, 3, 22, 23, 24]
    page = (tmp_path / "my" / "order.html").read_text()
    assert "red &lt;b&gt;" in page and "red <b>" not in page and page.count("<li>") == 9
    assert call("rank", tmp_path / "domain.yaml", "red") == 0
    assert (tmp_path / "runs" / "shapes" / "rank.html").exists()
