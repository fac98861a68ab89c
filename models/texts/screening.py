"""Screening: what is wrong with a text, and how much it is to count. Texts and numpy in, flags and weights out.

Nothing is dropped silently: a text keeps its row, and gets flags that say what was found, and a weight. The numbers of
this module are explained in docs/screening.md.
"""

from __future__ import annotations

import functools
import itertools
import re
import unicodedata
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from latteflow.models.settings import ScreenSettings

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]


@dataclass(frozen=True)
class Flag:
    """What a flag says, and what the text's weight is multiplied with: 0 drops it, 1 only tells."""

    meaning: str
    factor: float


FLAGS: Mapping[str, Flag] = {
    "empty": Flag("nothing that could be read", 0),
    "error": Flag("the model could not answer", 0),
    "refusal": Flag("the model declines to answer, or says that it sees no image", 0),
    "loop": Flag("says the same words over and over", 0),
    "unlike_image": Flag("fits other images clearly better than its own", 0),
    "kept_by_floor": Flag("would be dropped, but is among the best that its class has", 1),
    "cut": Flag("stopped at the longest output allowed", 0.8),
    "beyond_context": Flag("longer than the CLIP reads", 0.9),
    "identical": Flag("the same text stands at many images", 0.5),
    "other_language": Flag("not in the expected language", 0.5),
    "prompts_disagree": Flag("no more like the image's other texts than like those of another image", 0.7),
    "names_class": Flag("says the name of a class", 1),
}
"""Every flag that screening sets. A describer may set one itself, and it counts the same."""

FLOOR_WEIGHT = 0.1
"""Weight of a text that only the floor keeps: below that of every text that passed."""
_SHUFFLES = 16
"""Other images that each text is compared with."""
_LEAST_IDENTICAL = 5
"""Images that a text must stand at to be called identical, however few there are."""
_NOISE = 1e-6
"""Differences between cosines that are rounding and no more."""
_MAD_TO_DEVIATION = 1.4826
_ROWS = 4096
"""Rows that are multiplied at once, so that memory is bounded."""


@dataclass(frozen=True, kw_only=True)
class Texts:
    """The distinct texts, and what the CLIP makes of them.

    Attributes:
        texts: m of them.
        features: unit text features, ``(m, dim)``.
        too_long: which of them are longer than the CLIP reads, ``(m,)`` bool.
    """

    texts: Sequence[str]
    features: Floats
    too_long: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Subjects:
    """What the texts are about: images, or groups; in the order of their keys, which is all the shuffling there is.

    Attributes:
        features: unit features, ``(s, dim)``; of a group the direction of its members' mean.
        contents: ``(s,)`` digests: what has the same content is not another image.
        labels: pseudo-class of each, ``(s,)``.
    """

    features: Floats
    contents: Sequence[str]
    labels: Ints


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The table of texts, n rows.

    Attributes:
        keys: caption keys, which break ties.
        text, subject: row in :class:`Texts` and :class:`Subjects`, ``(n,)``.
        index: which of several texts about the same subject, ``(n,)``.
        finish_reasons: stop, length or error.
        flags: what the describer flagged.
    """

    keys: Sequence[str]
    text: Ints
    subject: Ints
    index: Ints
    finish_reasons: Sequence[str]
    flags: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Screened:
    """Row by row: flags (the describer's first), weight in [0, 1], and cosines with the own and with other images.

    The cosines are CLIPScore without its factor of 2.5 and its cut at 0 (Hessel et al. 2021); NaN where there is no
    text, and for other images where there is no other image.
    """

    flags: list[tuple[str, ...]]
    weights: NDArray[np.float32]
    clip_score: NDArray[np.float32]
    clip_score_shuffled: NDArray[np.float32]


def screen(texts: Texts, subjects: Subjects, rows: Rows, names: Sequence[str], settings: ScreenSettings) -> Screened:
    """Flag and weigh every text. A pure function; the same rows in another order get the same answers.

    Args:
        names: class names as they stand in a sentence.
    """
    own, other, spread = shuffled_scores(texts.features, subjects, rows)
    checks: dict[str, Callable[[str], bool]] = {
        "empty": is_empty,
        "refusal": is_refusal,
        "loop": is_loop,
        "other_language": lambda text: not fits_language(text, settings.language),
        "names_class": ClassNames(names).named_in,
    }
    by_text = np.array([[check(text) for check in checks.values()] for text in texts.texts], bool)
    found = {name: by_text.reshape(-1, len(checks))[rows.text, column] for column, name in enumerate(checks)}
    found["error"] = np.array([reason == "error" for reason in rows.finish_reasons], bool)
    silent = found["empty"] | found["error"]
    own[silent] = other[silent] = np.nan
    found["cut"] = np.array([reason == "length" for reason in rows.finish_reasons], bool)
    found["beyond_context"] = texts.too_long[rows.text]
    found["unlike_image"] = unlike(own - other, spread, settings.clip_margin)
    found["identical"] = identical(texts.texts, subjects, rows, settings.identical) & ~silent
    found["prompts_disagree"] = disagreement(texts.features, rows, ~silent)
    ordered = [name for name in FLAGS if name in found]
    # A message about a failure is no caption: nothing more is to be said of it.
    table = np.stack([found[name] if name in ("empty", "error") else found[name] & ~silent for name in ordered], axis=1)
    flags = [
        tuple(dict.fromkeys([*given, *(name for name, holds in zip(ordered, row, strict=True) if holds)]))
        for given, row in zip(rows.flags, table.tolist(), strict=True)
    ]
    weights = np.array([weight(each) for each in flags], np.float32)
    for row in _floor(weights, flags, own - other, subjects.labels[rows.subject], rows.keys, settings.floor):
        flags[row] = (*flags[row], "kept_by_floor")
        weights[row] = FLOOR_WEIGHT
    return Screened(flags, weights, own, other)


def weight(flags: Sequence[str]) -> float:
    """Product of the flags' factors; flags that are not screening's count 1."""
    product = 1.0
    for name in flags:
        product *= FLAGS[name].factor if name in FLAGS else 1.0
    return product


# --- against images ---------------------------------------------------------------------------------------------------


def shuffled_scores(
    text_features: Floats, subjects: Subjects, rows: Rows
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Cosine of each text with its own image, and mean and standard deviation of those with other images.

    The other images are those a fixed number of places further on in the ring of all images: keys are digests, so
    their order is random, every text meets others than its own, and nothing depends on a seed.

    Returns:
        Own, mean and deviation, ``(n,)`` float32 each; the last two NaN for a text without another image.
    """
    n = len(subjects.contents)
    content = np.unique(np.array(subjects.contents, dtype=np.str_), return_inverse=True)[1]
    own = _cosines(text_features, rows.text, subjects.features, rows.subject)
    shifts = sorted({1 + step * (n - 1) // _SHUFFLES for step in range(_SHUFFLES)}) if n > 1 else []
    total = np.zeros(len(own))
    squares, count = np.zeros_like(total), np.zeros_like(total)
    for shift in shifts:
        place = (rows.subject + shift) % n
        another = content[place] != content[rows.subject]
        # Relative to the own score, so that the small differences keep their digits.
        score = np.where(another, _cosines(text_features, rows.text, subjects.features, place) - own, 0.0)
        total, squares, count = total + score, squares + score**2, count + another
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(count > 0, total / count, np.nan)
        spread = np.sqrt(np.maximum(squares / count - mean**2, 0))
    return own, (own + mean).astype(np.float32), spread.astype(np.float32)


def unlike(margins: Floats, spread: Floats, deviations: float) -> NDArray[np.bool_]:
    """Whether a text fits its own image no better than others, and clearly worse than the texts of its domain do.

    A margin counts in standard deviations of the text's scores with other images. Were 0 the only bound, a CLIP that
    hardly knows the domain would drop many a true text: so a text must also be an outlier among all texts, below their
    median by so many standard deviations (estimated by the median absolute deviation).

    Args:
        margins, spread: ``(n,)``; NaN, which is never unlike, where there is nothing to compare.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        relative = np.where(spread > _NOISE, margins / spread, np.nan)
    known = relative[~np.isnan(relative)]
    if not len(known):
        return np.zeros(len(margins), bool)
    middle = np.median(known)
    usual = _MAD_TO_DEVIATION * np.median(np.abs(known - middle))
    return np.asarray(relative < min(0.0, middle - deviations * usual))


def disagreement(text_features: Floats, rows: Rows, said: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether the texts of an image, by different prompts, are no more alike than texts of two images.

    For each pair of prompts the cosine of an image's two texts is compared with the mean over pairs of texts from two
    images, which has the prompts' own styles in it and so needs no threshold. Of three texts or more, one that agrees
    with another is fine.

    Args:
        said: rows that have a text, ``(n,)``; others are left out.
    """
    best = np.full(len(rows.text), -np.inf)
    size = int(rows.subject.max(initial=-1)) + 1
    places = {}
    for index in np.unique(rows.index[said]):
        places[int(index)] = place = np.full(size, -1)
        at = np.flatnonzero(said & (rows.index == index))
        place[rows.subject[at]] = at
    for first, second in ((a, b) for a in places for b in places if a < b):
        both = np.flatnonzero((places[first] >= 0) & (places[second] >= 0))
        if len(both) < 2:
            continue
        one, two = places[first][both], places[second][both]
        cosines = _cosines(text_features, rows.text[one], text_features, rows.text[two])
        strangers = _cosines(text_features, rows.text[one], text_features, rows.text[np.roll(two, -1)])
        excess = cosines - strangers.mean(dtype=np.float64)
        for at in (one, two):
            best[at] = np.maximum(best[at], excess)
    return np.isfinite(best) & (best < 0)


def identical(texts: Sequence[str], subjects: Subjects, rows: Rows, share: float) -> NDArray[np.bool_]:
    """Whether a text, whatever its case and spaces, stands at more than this share of the different images.

    Counted for each prompt by itself, and at five images at least.
    """
    same: dict[str, int] = {}
    folded = np.array([same.setdefault(" ".join(text.casefold().split()), len(same)) for text in texts], int)
    content = np.unique(np.array(subjects.contents, dtype=np.str_), return_inverse=True)[1]
    asked = np.stack([rows.index.astype(int), folded[rows.text]], axis=1)
    kinds, kind = np.unique(asked, axis=0, return_inverse=True)
    kind = kind.reshape(-1)
    distinct = np.unique(np.stack([kind, content[rows.subject]], axis=1), axis=0)
    images = np.bincount(distinct[:, 0], minlength=len(kinds))
    bound = max(share * len(set(subjects.contents)), _LEAST_IDENTICAL - 1)
    return (images > bound)[kind]


def _cosines(a: Floats, rows_a: Ints, b: Floats, rows_b: Ints) -> NDArray[np.float32]:
    found = np.empty(len(rows_a), np.float32)
    for start in range(0, len(rows_a), _ROWS):
        part = slice(start, start + _ROWS)
        found[part] = np.einsum("nd,nd->n", a[rows_a[part]], b[rows_b[part]])
    return found


def _floor(
    weights: NDArray[np.float32],
    flags: Sequence[Sequence[str]],
    margins: NDArray[np.float32],
    labels: Ints,
    keys: Sequence[str],
    floor: int,
) -> Iterator[int]:
    """Rows that are kept so that no class loses everything: the best of each class that has lost all of its texts.

    What only fits badly comes before refusals and loops; then the larger margin, then the key. Messages of failures
    and empty texts are never kept.
    """
    for label in np.setdiff1d(labels, labels[weights > 0]):
        candidates = [row for row in np.flatnonzero(labels == label).tolist() if not {"empty", "error"} & {*flags[row]}]

        def rank(row: int) -> tuple[bool, float, str]:
            margin = float(margins[row])
            broken = bool({"refusal", "loop"} & {*flags[row]})
            return broken, -margin if margin == margin else 0.0, keys[row]

        yield from sorted(candidates, key=rank)[:floor]


# --- the text alone ---------------------------------------------------------------------------------------------------

_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uff66-\uff9f"
"""Thai, Lao, Burmese, Khmer, kana and Chinese characters: written without spaces, so that each counts as a word."""
_MARKS = r"\s!-/:-@\[-`{-~¡¿«»‐-―‘-‟…、。〈-】！（），．：；？～।॥،؛؟"
_WORD = re.compile(rf"[{_UNSPACED}]|[^{_MARKS}{_UNSPACED}]+")
_ASCII_WORD = re.compile(r"[^\W_]+", re.ASCII)


@functools.lru_cache(maxsize=4)  # several checks of one text follow each other
def words(text: str) -> tuple[str, ...]:
    """The words of a text, case folded, without punctuation; where a script has no spaces, its characters."""
    return tuple((_ASCII_WORD if text.isascii() else _WORD).findall(text.casefold()))


def is_empty(text: str) -> bool:
    """Whether there is no letter, digit or symbol in it."""
    return not any(each.isalnum() or unicodedata.category(each)[0] == "S" for each in text)


_SENTENCE = r"(?:^|(?<=[.!?\n:]))[\s*_#>-]*"
_IMAGE = r"(?:images?|pictures?|photos?|photographs?|attachments?|files?)"
_THE = r"(?:(?:the|this|that|any|an|a|your|these|those|actual|uploaded|attached|content of|contents of) ){0,3}"
_CANNOT = (
    r"(?:can't|cannot|can not|couldn't|could not|won't|will not|(?:am|'m) (?:currently )?(?:not able|unable) to|"
    r"(?:do not|don't) have the (?:ability|capability) to)"
)
_REFUSALS = re.compile(
    "|".join(
        _SENTENCE + pattern
        for pattern in (
            # I'm sorry, but I can't ...; Sorry, I cannot ...; Unfortunately, I am unable to ...
            rf"(?:i'?m |i am |my |i )?(?:\w+ )?(?:sorry|apologies|apologi[sz]e|unfortunately|regret)\b"
            rf"[^.!?\n]{{0,60}}?\bi(?:'m)? ?{_CANNOT}",
            rf"(?:i'?m |i am )?(?:sorry|unfortunately)\b[^.!?\n]{{0,30}}\bno {_IMAGE} (?:was|were|is|has|have)",
            # As an AI language model, ...; I am a text-based assistant
            r"as an? (?:\w+[ -]){0,2}(?:ai|artificial intelligence|language model|text[ -]based model)\b",
            r"i(?:'m| am) (?:just |only )?an? (?:\w+[ -]){0,2}(?:ai|language model|assistant)\b",
            # I can't see the image; I am unable to help with that
            rf"(?:but )?i ?{_CANNOT} (?:\w+ )?(?:view|see|open|access|display|load|process|analy[sz]e|describe|"
            rf"interpret) {_THE}{_IMAGE}",
            rf"(?:but )?i ?{_CANNOT} (?:\w+ )?(?:help|assist|comply|fulfil)\b(?! but)",
            rf"i (?:do not|don't) (?:\w+ )?(?:see|have|find) {_THE}{_IMAGE}",
            # No image was provided; the image could not be loaded; please upload an image
            rf"(?:it (?:seems|appears|looks) (?:like|that|as if) )?(?:there (?:is|was) )?no {_IMAGE} (?:(?:was|were|is|"
            r"has been|have been) )?(?:provided|attached|uploaded|given|included|shared|visible|present|here)\b",
            rf"(?:the |this )?{_IMAGE} (?:is missing|is not (?:available|visible|provided)|(?:could not|cannot|can't|"
            r"failed to|did not|didn't) (?:be )?(?:load|loaded|displayed?|processed|opened|viewed))\b",
            rf"(?:please|could you|can you) (?:please )?(?:re-?)?(?:provide|upload|attach|share|send) {_THE}{_IMAGE}",
            # The same in some other languages
            r"es tut mir (?:sehr )?leid\b[^.!?\n]{0,40}\bich (?:kann|bin nicht)",
            r"(?:je suis )?(?:vraiment |sincèrement )?désolée?\b[^.!?\n]{0,40}\bje ne (?:peux|puis|suis)",
            r"lo siento\b[^.!?\n]{0,40}\bno puedo",
            r"(?:我)?(?:很|非常)?(?:抱歉|对不起|對不起)[，,、 ]*(?:但|但是|不过)?我?(?:无法|不能|無法)",
            r"申し訳(?:あり|ござい)ません",
        )
    )
)


_SIGNS = (
    "sorry", "apolog", "unfortun", "regret", "an ai", "language model", "text-based", "assistant", "n't", "cannot",
    " not ", "unable", "no image", "no picture", "no photo", "no attachment", "no file", "missing", "failed", "please",
    "could you", "can you", "leid", "désol", "siento", "抱歉", "对不起", "對不起", "申し訳",
)  # fmt: skip
"""In every refusal, and seldom in captions: the patterns themselves are slow to try at every sentence."""


def is_refusal(text: str) -> bool:
    """Whether a sentence of the text begins like a model that declines, or that was given no image.

    Only where a sentence begins: "a sign that says sorry, we can't open" is a caption. Patterns are English, with the
    commonest German, French, Spanish, Chinese and Japanese ones.
    """
    text = text.lower().replace("’", "'")
    return any(sign in text for sign in _SIGNS) and _REFUSALS.search(text) is not None


_LEAST_DESCRIPTION = 5
_CODE = re.compile(r"[{}<>=]|#\w|\w\(\)|::|;\s*(?:\n|$)|```|iostream")


def describes_class(text: str) -> bool:
    """Whether a text can stand behind the sentence of a class (PC-CLIP 5.2): five words or more, and no program code,
    no refusal, no loop."""
    is_long = len(words(text)) >= _LEAST_DESCRIPTION
    return is_long and not (_CODE.search(text) or is_refusal(text) or is_loop(text))


_RUN = 8
"""Times that one word must follow itself."""
_GRAM = 4
_TAIL = 40
_FEW_WORDS = 16
_LONG = 200
_COMPRESSED = 5.0


def is_loop(text: str) -> bool:
    """Whether a generator was caught in a loop, in any script.

    One word eight times in a row; or, of 16 words and more, fewer than half of the sequences of four words are
    different, in the whole or, fewer than a third, in the last 40 words; or 200 characters and more shrink to a fifth
    under zlib. Honest captions keep nearly all sequences of four words different, and shrink to a half.
    """
    found = words(text)
    run = 1
    for one, two in itertools.pairwise(found):
        run = run + 1 if one == two else 1
        if run >= _RUN:
            return True
    if len(found) >= _FEW_WORDS and (_distinct(found) < 1 / 2 or _distinct(found[-_TAIL:]) < 1 / 3):
        return True
    data = text.encode(errors="surrogatepass")
    return len(text) >= _LONG and len(data) > _COMPRESSED * len(zlib.compress(data))


def _distinct(found: Sequence[str]) -> float:
    grams = len(found) - _GRAM + 1
    return len(set(zip(*(found[start:] for start in range(_GRAM)), strict=False))) / grams


class ClassNames:
    """Finds class names in texts: as whole words, whatever their case, with or without a plural s.

    Args:
        names: as they stand in a sentence.
    """

    def __init__(self, names: Sequence[str]) -> None:
        # By the number of words, so that a thousand names cost no more than ten.
        self._by_length: dict[int, set[tuple[str, ...]]] = {}
        for name in names:
            found = tuple(words(name))
            for each in (found, (*found[:-1], f"{found[-1]}s"), (*found[:-1], f"{found[-1]}es")) if found else ():
                self._by_length.setdefault(len(each), set()).add(each)

    def named_in(self, text: str) -> bool:
        """Whether the text says one of the names."""
        found = words(text)
        return any(
            gram in names
            for length, names in self._by_length.items()
            for gram in zip(*(found[start:] for start in range(length)), strict=False)
        )


_SCRIPTS: Mapping[str, tuple[str, ...]] = {
    "ru": ("CYRILLIC",), "uk": ("CYRILLIC",), "el": ("GREEK",), "ar": ("ARABIC",), "fa": ("ARABIC",),
    "he": ("HEBREW",), "hi": ("DEVANAGARI",), "bn": ("BENGALI",), "th": ("THAI",), "zh": ("CJK",),
    "ja": ("CJK", "HIRAGANA", "KATAKANA", "HALFWIDTH"), "ko": ("HANGUL",),
}  # fmt: skip
"""The scripts of languages that are not written in Latin letters."""


def _listed(common: str) -> frozenset[str]:
    return frozenset(common.split())


_STOP_WORDS: Mapping[str, frozenset[str]] = {
    "en": _listed("a an the is are of and or with in on by for there it this that has to from its which at"),
    "de": _listed("der die das ist sind und mit ein eine einen einem auf im von zu den dem nicht es sich wird"),
    "fr": _listed("le la les est sont et avec un une des du dans sur il elle qui que au aux ce cette pas"),
    "es": _listed("el la los las es son y con un una unos del en de hay que se su está por para al"),
    "it": _listed("il lo la gli è sono e con un una di della del in su che si nel alla per ha"),
    "pt": _listed("o os as é são e com um uma de da do dos em no na que se há está para ao"),
    "nl": _listed("de het een is zijn en met van in op aan er die dat niet voor wordt naar bij"),
}
_FEW_LETTERS = 8
_ENOUGH = 500
"""Characters of a text that show its script."""
_FEW_STOP_WORDS = 3


def fits_language(text: str, language: str) -> bool:
    """Whether a text may be in the expected language: a guess, in doubt yes.

    The script is looked at first: more than half of the letters in another script is another language; Russian and
    Ukrainian, say, are not told apart. Among languages in Latin letters the commonest words are counted, each once:
    another language has at least three of them, and twice as many as the expected one. Fewer than 8 letters fit every
    script.

    Args:
        language: as in ``ScreenSettings``; ``any`` fits everything.
    """
    if language == "any":
        return True
    if not text.isascii() or language in _SCRIPTS:
        letters = [each for each in text[:_ENOUGH] if each.isalpha()]
        expected = _SCRIPTS.get(language, ("LATIN",))
        fitting = sum(_script(each) in expected for each in letters)
        if len(letters) >= _FEW_LETTERS and 2 * fitting < len(letters):
            return False
    if language not in _STOP_WORDS:
        return True
    found = {*words(text)}
    counts = {each: len(known & found) for each, known in _STOP_WORDS.items()}
    most = max(counts.values())
    return most < _FEW_STOP_WORDS or most < 2 * counts[language]


@functools.lru_cache(maxsize=4096)
def _script(letter: str) -> str:
    return "LATIN" if letter.isascii() else unicodedata.name(letter, "?").partition(" ")[0]
