"""metrics.json: what earlier versions wrote is read, and what is not known is not written."""

import json

import pytest

from latteflow.tasks.report.scores import LabelFree, Score, Scores, ZeroShot

LABEL_FREE = {
    "agreement": 0.9, "margin_before": 0.1, "margin_after": 0.2, "entropy_before": 1.0, "entropy_after": 0.5,
    "predicted_before": [1, 2], "predicted_after": [2, 1],
}  # fmt: skip
SCORE = {"top1": 0.5, "interval": [0.4, 0.6], "top5": 1.0, "seeds": [0.5], "per_class": {"1": {"n": 3, "top1": 0.5}}}
METHOD = {**SCORE, "gain": 0.1, "gain_interval": [0.0, 0.2], "label_free": LABEL_FREE}
ZERO = {"plain": 0.4, "centred": 0.3, "top1": 0.4, "better": "zero_shot_plain", "methods": {"zero_shot_plain": SCORE}}
FIRST = {
    "domain": "d", "n_test": 3, "classes": ["a", "b"], "centred": True, "zero_shot": ZERO,
    "methods": {"latteclip": METHOD}, "label_free": LABEL_FREE, "confusion": {"latteclip": [[1, 0], [1, 1]]},
}  # fmt: skip


@pytest.mark.parametrize("more", [{}, {"format": 2, "confusion": {"latteclip": [[0, 1, 3]]}}, {"format": 4, "new": 1}])
def test_other_formats_are_read(more: dict) -> None:
    found = Scores.model_validate_json(json.dumps({**FIRST, **more}))
    assert found.format == more.get("format", 1) and (found.n_test, found.n_seen, found.slices) == (3, 0, ())
    assert list(found.of) == ["zero_shot_plain", "latteclip"] and found.of["latteclip"].per_class[1].n == 3
    assert found.of["latteclip"].gained == (0.1, 0.0, 0.2) and found.of["zero_shot_plain"].gained is None


def test_what_is_not_known_is_not_written_and_the_rest_comes_back() -> None:
    free = LabelFree(**LABEL_FREE)
    scores = Scores(
        domain="d", n_test=0, classes=["a", "b"], methods={"latteclip": Score(top1=None, label_free=free)},
        zero_shot=ZeroShot(plain=None, centred=None, top1=None, better="zero_shot_plain", methods={}), label_free=free,
    )  # fmt: skip
    written = scores.written()
    assert json.loads(written)["methods"] == {"latteclip": {"top1": None, "label_free": LABEL_FREE}}
    assert Scores.model_validate_json(written) == scores
    broken = scores.model_copy(update={"centre_share": float("nan")})
    with pytest.raises(ValueError, match="not JSON compliant"):
        broken.written()
