"""Golden checks of PC-CLIP's description (section 10): every number of it, and those that must not come out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from latteflow.models.methods.adaptation import PairData
from latteflow.models.methods.losses import clip_loss
from latteflow.models.methods.pc_clip import PcClipSettings
from latteflow.models.methods.pc_clip.comparative import (
    compare_prompts,
    confused_pairs,
    difference_accuracy,
    difference_scores,
    oracle_pairs,
    projections,
    ranking,
    soft_confusion,
    unit,
)
from latteflow.models.methods.pc_clip.pairs import unrank
from latteflow.models.methods.pc_clip.tuning import DRIFT, PcClip, difference, drift_matched_lr, pair_loss
from latteflow.models.texts.differences import read_difference

# G1: images are not normalized, nor are texts.
FIRST = torch.tensor([[3.0, 0, 4, 0], [0, 2, 0, 0], [1, 1, 1, 1]], dtype=torch.float64)
SECOND = torch.tensor([[0.0, 2, 0, 0], [1, 1, 1, 1], [0, 0, 0, 5]], dtype=torch.float64)
TEXTS = torch.tensor([[1.0, -1, 1, 0], [0, 1, -1, -1], [1, 1, 0, -2]], dtype=torch.float64)


def near(found: object, expected: object) -> None:
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), atol=1e-5)


def test_g1_differences() -> None:
    found = difference(FIRST, SECOND)
    near(found, [[0.6, -1, 0.8, 0], [-0.5, 0.5, -0.5, -0.5], [0.5, 0.5, 0.5, -0.5]])
    near(found.norm(dim=1), [1.414214, 1, 1])
    cosines = nn.functional.normalize(TEXTS, dim=1) @ nn.functional.normalize(found, dim=1).T
    near(cosines, [[0.979796, -0.866025, 0.288675], [-0.734847, 0.866025, 0.288675], [-0.115470, 0.408248, 0.816497]])


def test_g1_losses() -> None:
    delta = difference(FIRST, SECOND)
    logits = nn.functional.normalize(TEXTS, dim=1) @ nn.functional.normalize(delta, dim=1).T
    for temperature, rows, columns, whole in ((1, 0.598420, 0.595802, 0.597111), (0.1, 0.006971, 0.006798, 0.006885)):
        for matrix, expected in ((logits, rows), (logits.T, columns)):
            near(nn.functional.cross_entropy(matrix / temperature, torch.arange(3)), expected)
        near(pair_loss(delta, TEXTS, temperature), whole)
    near(pair_loss(delta, TEXTS, loss="squared_error"), 0.071973)


def test_g1_gradient_of_the_texts() -> None:
    texts = TEXTS.clone().requires_grad_()
    pair_loss(difference(FIRST, SECOND), texts).backward()
    near(
        texts.grad,
        [
            [0.028395, 0.046762, 0.018367, -0.036834],
            [0.080213, 0.012544, 0.040961, -0.028417],
            [-0.029259, -0.015221, -0.042927, -0.022240],
        ],
    )


def test_g1_what_must_not_come_out() -> None:
    texts = nn.functional.normalize(TEXTS, dim=1)
    plain = nn.functional.normalize(FIRST - SECOND, dim=1)
    near(clip_loss(difference(FIRST, SECOND), texts, 1), 0.541517)
    near(clip_loss(plain, texts, 1), 0.607522)
    near(pair_loss(difference(SECOND, FIRST), TEXTS), 1.956844)


def test_g2_comparative_prompting() -> None:
    t = np.array([[1, 0], [0.6, 0.8], [0, 1]])
    pairs, c = [(0, 1), (2, 1)], np.array([[0.8, -0.6], [-0.6, 0.8]])
    for alpha, expected in (
        (0.9, [0.606673, 0.794951]), (0.8, [0.613941, 0.789352]), (0.5, [0.640184, 0.768221]), (1, [0.6, 0.8]),
    ):  # fmt: skip
        found = compare_prompts(t, pairs, c, alpha)
        near(found, [t[0], expected, t[2]])
    image = unit(np.array([0.28, 0.96]))
    near([image @ t[1], image @ compare_prompts(t, pairs, c)[1]], [0.936, 0.933022])


def test_g3_difference_classification() -> None:
    first, second = np.array([[1.0, 0, 0], [0, 3, 4], [2, 2, 1]]), np.array([[0.0, 1, 0], [0, 4, 3], [2, 2, 1]])
    texts = np.array([[1.0, -2, 0], [0, 1, 0], [0, 1, 1]])
    scores = difference_scores(first, second, texts)
    near(scores, [0.948683, -0.707107, 0])
    near(difference_accuracy(scores), 1 / 3)
    assert (difference_scores(second, first, texts) > 0).tolist() == [False, True, False]
    near(np.mean([0.66, 0.68, 0.67, 0.69, 0.65]), 0.67)
    near(np.std([0.66, 0.68, 0.67, 0.69, 0.65]) / math.sqrt(5), 0.006325)


def test_g3_ranking() -> None:
    images, text = np.array([[1.0, 2, 2], [2, 0, 1], [0, 3, 4], [1, 1, 0]]), np.array([2.0, -1, 1])
    near(projections(images, text), [0.272166, 0.912871, 0.081650, 0.288675])
    assert ranking(images, text).tolist() == [1, 3, 0, 2]
    i, j = np.array([0, 0, 0, 1, 1, 2]), np.array([1, 2, 3, 2, 3, 3])
    scores = difference_scores(images[i], images[j], np.tile(text, (6, 1)))
    near(scores, [-0.713027, 0.521749, -0.021571, 0.733427, 0.728033, -0.192929])
    assert ((projections(images, text)[i] > projections(images, text)[j]) == (scores > 0)).all()


KEPT_1 = "The clock on the building is much larger than the clocks on the wall, and it stands outdoors."
KEPT_3 = "The first image shows two zebras grazing in tall grass, while the second shows a lone giraffe near trees."
KEPT_5 = "The first image shows a man on a surfboard riding a wave in the ocean."
RAW_6 = (
    ". The first picture is taken at night with street lamps lit,\nwhile the second\tpicture is taken  in daylight "
    "at a harbour."
)
KEPT_6 = (
    "The first picture is taken at night with street lamps lit,while the second picture is taken in daylight at a "
    "harbour."
)
LONG = "The first image shows a street at night, while the second image shows a field by day"


@pytest.mark.parametrize(
    ("raw", "text", "length"),
    [
        (f"A: {KEPT_1}", KEPT_1, 93),
        (f"{KEPT_3} Note: captions only.", KEPT_3, 105),
        (f"#1: {KEPT_5} #2: The second ...", KEPT_5, 70),
        (RAW_6, KEPT_6, 117),
        (60 * "x", 60 * "x", 60),
    ],
)
def test_g4_kept(raw: str, text: str, length: int) -> None:
    found = read_difference(raw, mode="compat")
    assert (found.text, found.rule, len(found.text)) == (text, None, length)


@pytest.mark.parametrize(
    ("raw", "rule"),
    [
        ("A: The first image shows a red bus on a street.\nQ: What is ...", "too_short"),
        (f"{LONG} at a café.", "not_ascii"),
        (f"* {LONG}.", "asterisk"),
        (f"\n\n\n{LONG}.", "blank_start"),
        (f" \n\n\n{LONG}.", "blank_start"),
        (f"Description: {LONG}.", "prompt_echo"),
        (f"{LONG} of 1000000 flowers.", "digit_or_symbol_run"),
        (59 * "y", "too_short"),
    ],
)
def test_g4_rejected(raw: str, rule: str) -> None:
    assert read_difference(raw, mode="compat").rule == rule


def test_g5_pair_numbers() -> None:
    i, j = unrank([0, 3, 4, 6, 9], 5)
    assert list(zip(i.tolist(), j.tolist(), strict=True)) == [(0, 1), (0, 4), (1, 2), (1, 4), (3, 4)]
    i, j = unrank([999, 250000, 499499], 1000)
    assert list(zip(i.tolist(), j.tolist(), strict=True)) == [(1, 2), (293, 365), (998, 999)]


def test_g5_steps_and_rates() -> None:
    n = 499_500
    cfg = PcClipSettings(train="projection")
    assert math.ceil(n / cfg.batch_size) == 976
    assert pytest.approx(8.573e-5, rel=1e-4) == DRIFT
    assert drift_matched_lr(DRIFT, 976) == pytest.approx(1e-8)
    rates = [1e-8 * cfg.decay**epoch for epoch in (0, 1, 9, 19)]
    np.testing.assert_allclose(rates, [1e-8, 9e-9, 3.874205e-9, 1.350852e-9], rtol=1e-6)
    for pairs, expected in ((50_000, 1.0e-7), (10_000, 4.9e-7), (1000, 4.9e-6)):
        assert drift_matched_lr(8.573e-5, math.ceil(pairs / 512)) == pytest.approx(expected, rel=0.02)
    method = PcClip(
        PcClipSettings(train="projection", lr=1e-8, batch_size=2),
        torch.eye(4),
        PairData(first=torch.tensor([0, 1, 2]), second=torch.tensor([1, 2, 3]), texts=torch.eye(4)[:3]),
    )
    assert method.steps_per_epoch == 2 and method.n_steps == 40
    found = [method.learning_rate(2 * epoch + 1) for epoch in (0, 1, 9, 19)]
    np.testing.assert_allclose(found, [1e-8, 9e-9, 3.874205e-9, 1.350852e-9], rtol=1e-6)


def test_g5_confusions() -> None:
    counts = np.array([[40, 5, 1, 4], [9, 30, 2, 9], [0, 3, 45, 2], [7, 0, 1, 42]])
    assert oracle_pairs(counts, 3) == [(1, 0), (1, 3), (3, 0)]
    found = soft_confusion(np.array([[0.6, 0.3, 0.1], [0.5, 0.45, 0.05], [0.1, 0.2, 0.7], [0.4, 0.4, 0.2]]))
    near(found, [[0, 0.585, 0.235], [0.585, 0, 0.2725], [0.235, 0.2725, 0]])
    assert confused_pairs(found, 2) == [(0, 1), (1, 0), (1, 2), (2, 1)]


def test_g5_geometry() -> None:
    a, b, d = np.array([2.0, 1, 0]), np.array([1.0, 1, 1]), np.array([1.0, 0, -2])
    near([1 - unit(a - b) @ unit(d), 1 - unit(b - a) @ unit(d)], [0.051317, 1.948683])
    near(1 - unit(unit(a) - unit(b)) @ unit(d), 0.019693)
