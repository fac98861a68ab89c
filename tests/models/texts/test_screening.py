"""Screening: what is flagged and what must not be, in several writing systems; weights, floor, shuffling."""

import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latteflow.models.settings import ScreenSettings
from latteflow.models.texts.screening import (
    FLAGS,
    FLOOR_WEIGHT,
    ClassNames,
    Rows,
    Screened,
    Subjects,
    Texts,
    disagreement,
    fits_language,
    is_empty,
    is_loop,
    is_refusal,
    screen,
    shuffled_scores,
    unlike,
    weight,
)

HONEST = [
    "a sign that says sorry",
    'A sign in a shop window that says "Sorry, we can\'t open today".',
    "A robot with the words 'I am an AI' on its chest.",
    "A grey square with the words no image available.",
    "I cannot see any text in the picture; it shows a pair of brown boots.",
    "A person looks sorry; he cannot open the door.",
    "Sorry-looking dog in the rain. It could not be wetter.",
    "As an airplane flies over, people look up.",
    "Please keep off the grass, says the sign beside the image of a dog.",
    "very very very nice dress",
    "red",
    "The shirt has stripes: white, blue, white, blue, white, blue, white, blue and white.",
    "A red square, a blue square, a green square, a yellow square, a red circle, a blue circle and a green circle.",
    "The first image shows a cat. The second image shows a dog. The third image shows a bird. The fourth shows a fish.",
    "Ha ha ha, says the clown on the poster, which hangs beside two other posters of the same circus.",
    "一只猫坐在红色的沙发上，旁边有一个蓝色的枕头和一本打开的书，背景是一面白色的墙。",
    "テーブルの上に赤いりんごが置かれており、その隣には水の入ったグラスがあります。",
    "रसोई की मेज पर एक लाल सेब रखा है और उसके पास एक गिलास पानी है।",
    "قطة سوداء تجلس على كرسي خشبي بجانب النافذة المفتوحة في غرفة صغيرة",
    "แมวสีดำนั่งอยู่บนโซฟาสีแดงข้างหน้าต่างในห้องเล็กๆ",
    "На столе лежит красное яблоко, а рядом стоит стакан воды и лежит открытая книга.",
    "빨간 사과가 식탁 위에 놓여 있고 그 옆에는 물 한 잔이 있습니다.",
]


@pytest.mark.parametrize("text", HONEST)
def test_honest_captions_pass(text: str) -> None:
    assert not is_empty(text) and not is_refusal(text) and not is_loop(text)
    assert fits_language(text, "any")


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't assist with that.",
        "I’m sorry, but I cannot see the image you are referring to.",
        "Sorry, but no image was included.",
        "I apologize, but I am not able to identify people in images.",
        "Unfortunately, I cannot describe this picture.",
        "As an AI language model, I cannot view images.",
        "As an AI, I do not have eyes.",
        "I'm a text-based AI assistant and cannot view photos.",
        "I am unable to view the image.",
        "I'm unable to see images directly.",
        "I can't help with identifying people.",
        "I don't see any image here.",
        "No image was provided.",
        "It seems that no image was uploaded. Please provide the image.",
        "Thank you for your question! Please upload an image so that I can describe it.",
        "The image could not be loaded.",
        "Es tut mir leid, aber ich kann das Bild nicht sehen.",
        "Je suis désolé, mais je ne peux pas voir l'image.",
        "Lo siento, pero no puedo ver la imagen.",
        "抱歉，我无法查看图片。",
        "申し訳ありませんが、画像を表示できません。",
    ],
)
def test_refusals_are_found(text: str) -> None:
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "the dog is on the " * 6,
        "no " * 9,
        "A red shoe on a white ground. " * 8,
        "A nice dress with flowers and a ribbon that hangs down to the floor, and a hat" + " and a hat" * 12,
        "和" * 30,
        "一只猫坐在沙发上，" * 6,
        "ข้างหน้าต่าง" * 8,
        "गाड़ी लाल है " * 9,
        "سيارة حمراء " * 9,
        "aB" * 200,
    ],
)
def test_loops_are_found(text: str) -> None:
    assert is_loop(text)


@given(st.lists(st.sampled_from("abcdefg"), max_size=15).map(" ".join))
def test_a_short_text_is_a_loop_only_by_one_word_over_and_over(text: str) -> None:
    assert is_loop(text) == any(" ".join([word] * 8) in text for word in "abcdefg")


@pytest.mark.parametrize("text", ["", " \n\t", "...", "-- !", "\u200b\u202e", "「」。"])
def test_nothing_readable_is_empty(text: str) -> None:
    assert is_empty(text)


@pytest.mark.parametrize("text", ["a", "7", "犬", "👕", "é", "ب"])
def test_a_letter_a_digit_or_a_symbol_is_not_empty(text: str) -> None:
    assert not is_empty(text)


@pytest.mark.parametrize(
    ("text", "language", "fits"),
    [
        ("A red shoe lies on the table.", "en", True),
        ("something like a cardigan", "en", True),
        ("a picture of a fruit, like a fig or a pomegranate", "en", True),
        ("Ein roter Schuh liegt auf dem Tisch und ist sehr schön.", "en", False),
        ("Ein roter Schuh liegt auf dem Tisch und ist sehr schön.", "de", True),
        ("Le chat noir est assis sur une chaise avec un coussin.", "en", False),
        ("Un gato negro está sentado en la silla con una manta.", "en", False),
        ("The cat sits on a chair with the cushion.", "fr", False),
        ("一只猫坐在红色的沙发上", "en", False),
        ("一只猫坐在红色的沙发上", "zh", True),
        ("テーブルの上に赤いりんご", "ja", True),
        ("テーブルの上に赤いりんごがある", "zh", False),
        ("На столе лежит красное яблоко", "en", False),
        ("На столе лежит красное яблоко", "ru", True),
        ("A red apple lies on the table", "ru", False),
        ("A red shirt with the word 東京 on it", "en", True),
        ("rot", "en", True),  # in doubt, yes
    ],
)
def test_languages_by_script_and_common_words(text: str, language: str, fits: bool) -> None:
    assert fits_language(text, language) == fits


def test_class_names_are_whole_words() -> None:
    names = ClassNames(["t-shirt", "dress", "ankle boot", "犬", "C++"])
    said = ["A T-Shirt.", "two dresses", "an ankle  boot", "ankle boots, black", "黒い犬がいる", "code in c++"]
    unsaid = ["a shirt", "an address", "a boot and an ankle", "", "猫", "dressed up"]
    assert [names.named_in(text) for text in said] == [True] * len(said)
    assert [names.named_in(text) for text in unsaid] == [False] * len(unsaid)


# --- tables -----------------------------------------------------------------------------------------------------------


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def table(
    said: list[str],
    *,
    features: np.ndarray | None = None,
    noise: float = 0.3,
    subject: list[int] | None = None,
    index: list[int] | None = None,
    labels: list[int] | None = None,
    reasons: list[str] | None = None,
    flags: list[tuple[str, ...]] | None = None,
    swapped: tuple[int, ...] = (),
) -> tuple[Texts, Subjects, Rows]:
    """Texts whose features are their image's and some noise; those of ``swapped`` rows point the other way."""
    n = len(said)
    subject = list(range(n)) if subject is None else subject
    size = max(subject, default=-1) + 1
    rng = np.random.default_rng(0)
    images = unit(rng.normal(size=(size, 16))) if features is None else features
    vectors = unit(images[subject] + noise * rng.normal(size=(n, 16)) / 4) if n else np.zeros((0, 16), np.float32)
    vectors[list(swapped)] *= -1
    texts = Texts(texts=said, features=vectors, too_long=np.array([len(text) > 300 for text in said], bool))
    subjects = Subjects(
        features=images, contents=[f"{row}" for row in range(size)], labels=np.array(labels or [0] * size)
    )
    rows = Rows(
        keys=[f"{row:04}" for row in range(n)],
        text=np.arange(n),
        subject=np.array(subject, int),
        index=np.array(index or [0] * n, int),
        finish_reasons=reasons or ["stop"] * n,
        flags=flags or [()] * n,
    )
    return texts, subjects, rows


def screened(*args: object, **options: object) -> Screened:
    texts, subjects, rows = table(*args, **options)  # type: ignore[arg-type]
    return screen(texts, subjects, rows, ["t-shirt", "dress"], ScreenSettings())


def captions(n: int) -> list[str]:
    return [f"A thing with the number {row} on it, and a shadow to its left." for row in range(n)]


def test_each_flag_is_set_and_weighs_what_its_table_says() -> None:
    said = captions(24)
    said[0], said[1], said[2] = "", "I'm sorry, but I can't help with that.", "a hat and " * 9
    said[4] = "A dress of red cloth."
    said[5] = "Ein roter Schuh liegt auf dem Tisch und ist sehr schön."
    said[6] = "A long and honest caption about a shoe. " + " ".join(f"Detail {row}." for row in range(40))
    reasons = ["stop"] * 24
    reasons[3], reasons[7] = "error", "length"
    said[8:13] = ["The same text"] * 2 + ["the  same text"] * 3
    flags: list[tuple[str, ...]] = [()] * 24
    flags[9] = ("odd",)
    result = screened(said, reasons=reasons, flags=flags, swapped=(13,))
    expected = {
        0: ("empty",), 1: ("refusal",), 2: ("loop",), 3: ("error",), 4: ("names_class",), 5: ("other_language",),
        6: ("beyond_context",), 7: ("cut",), 8: ("identical",), 9: ("odd", "identical"), 12: ("identical",),
        13: ("unlike_image",), 14: (), 23: (),
    }  # fmt: skip
    assert {row: result.flags[row] for row in expected} == expected
    assert result.weights[[0, 1, 2, 3, 13]].tolist() == [0] * 5
    assert result.weights[[4, 14]].tolist() == [1, 1]
    assert result.weights[[5, 6, 7, 8, 9]].tolist() == pytest.approx([0.5, 0.9, 0.8, 0.5, 0.5])
    assert np.isnan(result.clip_score[[0, 3]]).all() and not np.isnan(result.clip_score[1:3]).any()


def test_a_message_of_failure_gets_no_other_flag() -> None:
    result = screened(
        ["I'm sorry, but I can't see the dress."] * 2 + captions(6), reasons=["error", "stop"] + ["stop"] * 6
    )
    assert result.flags[0] == ("error",) and result.flags[1] == ("refusal", "names_class")


def test_a_describers_own_flag_of_the_same_name_counts_the_same() -> None:
    result = screened(captions(3), flags=[("refusal",), ("odd",), ()])
    assert result.weights.tolist() == [0, 1, 1] and weight(["cut", "odd"]) == pytest.approx(0.8)


def test_four_at_the_same_text_are_few_and_copies_of_an_image_are_one() -> None:
    assert not any(screened(["the same"] * 4 + captions(4)).flags)
    texts, subjects, rows = table(["the same"] * 5 + captions(3))
    copies = Subjects(features=subjects.features, contents=["x", "x", *subjects.contents[2:]], labels=subjects.labels)
    assert not any(screen(texts, copies, rows, [], ScreenSettings()).flags)
    assert screen(texts, subjects, rows, [], ScreenSettings()).flags[:5] == [("identical",)] * 5


def test_shuffled_scores_against_a_plain_loop() -> None:
    texts, subjects, rows = table(captions(7), noise=2.0)
    contents = ["a", "b", "c", "a", "d", "e", "f"]
    own, other, spread = shuffled_scores(
        texts.features, Subjects(features=subjects.features, contents=contents, labels=subjects.labels), rows
    )
    for row in range(7):
        others = [
            float(texts.features[row] @ subjects.features[image])
            for image in range(7)
            if contents[image] != contents[row]
        ]
        assert own[row] == pytest.approx(float(texts.features[row] @ subjects.features[row]), abs=1e-6)
        assert (other[row], spread[row]) == (
            pytest.approx(np.mean(others), abs=1e-5),
            pytest.approx(np.std(others), abs=1e-5),
        )


def test_with_hundreds_of_images_a_text_meets_sixteen_others_and_never_its_own() -> None:
    n = 500
    images = np.eye(n, dtype=np.float32)
    texts = Texts(texts=captions(n), features=images, too_long=np.zeros(n, bool))
    rows = Rows(
        keys=captions(n), text=np.arange(n), subject=np.arange(n), index=np.zeros(n, int),
        finish_reasons=["stop"] * n, flags=[()] * n,
    )  # fmt: skip
    subjects = Subjects(features=images, contents=captions(n), labels=np.zeros(n, int))
    own, other, _ = shuffled_scores(texts.features, subjects, rows)
    assert own.min() == 1 and other.max() == 0
    all_ones = Texts(texts=texts.texts, features=np.ones_like(images), too_long=texts.too_long)
    assert shuffled_scores(all_ones.features, subjects, rows)[1].tolist() == [1.0] * n  # a mean of whole others


def test_one_image_alone_is_like_itself() -> None:
    result = screened(captions(1))
    assert result.flags == [()] and np.isnan(result.clip_score_shuffled).all()


def test_nothing_at_all_is_screened_to_nothing() -> None:
    assert screened([]).flags == []


def test_a_bad_clip_drops_few_true_texts_and_a_good_one_most_false_ones() -> None:
    rng = np.random.default_rng(1)
    ones = np.ones(10_000, np.float32)
    hardly = rng.normal(0.5, 1, 10_000).astype(np.float32)  # a CLIP that hardly knows the domain; all texts are true
    assert unlike(hardly, ones, 2).mean() < 0.03 and (hardly < 0).mean() > 0.3
    knows = rng.normal(4, 1.2, 10_000).astype(np.float32)
    knows[:1000] = rng.normal(0, 1, 1000)  # texts of other images
    found = unlike(knows, ones, 2)
    assert found[:1000].mean() > 0.45 and found[1000:].mean() < 0.001
    assert not unlike(np.zeros(9, np.float32) - 1e-8, np.full(9, 1e-9, np.float32), 2).any()  # rounding, no score


def test_prompts_disagree_where_an_images_texts_are_strangers() -> None:
    n = 40
    subject, index = [*range(n), *range(n)], [0] * n + [1] * n
    texts, _, rows = table(captions(2 * n), subject=subject, index=index, noise=0.5, swapped=(n + 3,))
    found = disagreement(texts.features, rows, np.ones(2 * n, bool))
    assert np.flatnonzero(found).tolist() == [3, n + 3]
    said = np.ones(2 * n, bool)
    said[n + 3] = False  # a text that is not there agrees with nothing and disagrees with nothing
    assert not disagreement(texts.features, rows, said).any()
    alone, _, rows = table(captions(n))
    assert not disagreement(alone.features, rows, np.ones(n, bool)).any()


def test_of_three_prompts_the_odd_one_is_told() -> None:
    n = 40
    texts, _, rows = table(
        captions(3 * n), subject=[*range(n)] * 3, index=[0] * n + [1] * n + [2] * n, noise=0.2, swapped=(2 * n + 5,)
    )
    assert np.flatnonzero(disagreement(texts.features, rows, np.ones(3 * n, bool))).tolist() == [2 * n + 5]


def test_the_floor_keeps_the_best_of_a_class_that_would_lose_all() -> None:
    said = ["I'm sorry, but I can't help with that."] * 4 + [""] * 2 + captions(14)
    result = screened(said, labels=[1] * 6 + [0] * 14, swapped=(3,))
    kept = [row for row, flags in enumerate(result.flags) if "kept_by_floor" in flags]
    assert len(kept) == 3 and set(kept) < {0, 1, 2, 3}
    margins = result.clip_score - result.clip_score_shuffled
    assert margins[kept].min() > max(margins[row] for row in range(4) if row not in kept)
    assert result.weights[kept].tolist() == pytest.approx([FLOOR_WEIGHT] * 3)
    assert result.weights[4:6].tolist() == [0, 0]
    empty = screened([""] * 3 + captions(5), labels=[1] * 3 + [0] * 5)
    assert empty.weights[:3].tolist() == [0] * 3, "nothing is there to keep"


def test_the_floor_prefers_a_doubtful_caption_to_a_refusal() -> None:
    said = ["I'm sorry, but I can't help with that.", *captions(20)[1:]]
    texts, subjects, rows = table(said, labels=[1, 1] + [0] * 18 + [0], swapped=(1,))
    result = screen(texts, subjects, rows, [], ScreenSettings(floor=1))
    assert result.flags[:2] == [("refusal",), ("unlike_image", "kept_by_floor")]


TEXT = st.one_of(
    st.text(max_size=40),
    st.sampled_from([*HONEST, "", "I'm sorry, but I can't help.", "a hat and " * 20, "The same text"]),
)
ROW = st.tuples(TEXT, st.integers(0, 3), st.sampled_from(["stop", "stop", "length", "error"]), st.integers(0, 2))


@settings(max_examples=60)
@given(st.lists(ROW, min_size=1, max_size=30), st.randoms(use_true_random=False))
def test_whatever_comes_weights_and_flags_hold_together(rows: list[tuple[str, int, str, int]], dice: object) -> None:
    said = [text for text, *_ in rows]
    labels, reasons = [label for _, label, *_ in rows], [reason for _, _, reason, _ in rows]
    swapped = tuple(row for row, (*_, swap) in enumerate(rows) if swap == 0)
    result = screened(said, labels=labels, reasons=reasons, swapped=swapped)
    assert ((result.weights >= 0) & (result.weights <= 1)).all()
    for flags, value in zip(result.flags, result.weights.tolist(), strict=True):
        assert set(flags) <= FLAGS.keys() and len(flags) == len(set(flags))
        if "kept_by_floor" in flags:
            assert value == pytest.approx(FLOOR_WEIGHT) and not {"empty", "error"} & set(flags)
        else:
            assert (value == 0) == any(FLAGS[name].factor == 0 for name in flags)
            assert value == 0 or value > FLOOR_WEIGHT
    for label in set(labels):
        own = [row for row in range(len(rows)) if labels[row] == label]
        if not result.weights[own].any():
            assert all({"empty", "error"} & set(result.flags[row]) for row in own), "the floor left a class nothing"
    # The order of the table is nobody's business.
    order = list(range(len(rows)))
    dice.shuffle(order)  # type: ignore[attr-defined]
    texts, subjects, table_rows = table(said, labels=labels, reasons=reasons, swapped=swapped)
    moved = Rows(
        keys=[table_rows.keys[row] for row in order], text=table_rows.text[order], subject=table_rows.subject[order],
        index=table_rows.index[order], finish_reasons=[reasons[row] for row in order], flags=[()] * len(rows),
    )  # fmt: skip
    again = screen(texts, subjects, moved, ["t-shirt", "dress"], ScreenSettings())
    assert again.flags == [result.flags[row] for row in order]
    assert again.weights.tolist() == result.weights[order].tolist()


def test_a_hundred_thousand_texts_take_seconds() -> None:
    n = 20_000
    said = [
        f"The picture shows a red shoe, number {row}, on a white table, with a shadow to its left." for row in range(n)
    ]
    texts, subjects, rows = table(said)
    begin = time.process_time()
    screen(texts, subjects, rows, [f"class {row}" for row in range(1000)], ScreenSettings())
    assert time.process_time() - begin < 12, "about 1.5 s on an idle machine; 100,000 in five times that"


def test_needs_no_torch() -> None:
    code = "import sys, latteflow.models.texts.screening; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
