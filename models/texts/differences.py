"""Difference texts: what a language model answered, cleaned up, or the rule by which it is not used (PC-CLIP 3.3)."""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from latteflow.models.settings import FilterMode
from latteflow.models.texts.screening import is_loop, is_refusal, words

LEAST_CHARACTERS = 60
MOST_TOKENS = 75
GRAM_SHARE, COMPRESSED, COPIED = 0.3, 0.35, 0.9

RULES: Mapping[str, str] = {
    "error": "the model could not answer",
    "blank_start": "begins with blank lines, # 1000 or #include",
    "not_ascii": "has a character that is not ASCII; the compat filter reads English only",
    "asterisk": "has an asterisk, as Markdown has",
    "code": "has a piece of program code or markup",
    "prompt_echo": "repeats a form of the prompt (Description:)",
    "digit_or_symbol_run": "repeats a digit or a symbol",
    "stutter": "repeats a syllable",
    "off_topic": "one of the answers about something else that the paper's model was found to give",
    "too_short": f"fewer than {LEAST_CHARACTERS} characters are left",
    "too_long": f"more than {MOST_TOKENS} words and marks, more than a CLIP reads",
    "loop": "says the same over and over",
    "markup": "has a code fence, an HTML tag or an address",
    "speaks_of_captions": "speaks about captions or descriptions, not about what is seen",
    "copies_caption": "is nearly word for word one of the two descriptions",
    "copies_prompt": "is nearly word for word in the question, where it stood as an example",
    "refusal": "the model declines to answer",
}
"""Every rule that rejects a text, and what it says. Those from blank_start to off_topic are of compat alone."""

_COMPAT: Mapping[str, Sequence[str]] = {
    "asterisk": ("*",),
    "code": (
        "#define", "</p>", "<br>", "{{{", '"""', "gatsbyjs", "front-end-d", "%3D%3D%3D%3D%3D%3D%3D%", r"$\}\}%",
    ),
    "prompt_echo": ("Description of the image:", "Description:"),
    "digit_or_symbol_run": (
        58 * "0", "1000000", "11111", "55555", "0:00:00", "?????????", "!!!!!", "****", "-----", ".. .. ..",
        ". . . . ", '" " "',
    ),
    "stutter": (
        "thththth", "tthth", "thttht", "tgthtgthtgth", "thumbthumb", "t=t=t=t=", "t:t:t:", "t.t.t.t", "t-t-t-t",
        "t,t,t,", "t_t_t_", "t1t1t1", "t=A:t=A", "tone:tone", "aaaaaaa", "aiaiai", "lamalamalama", "mwm",
    ),
    "off_topic": (
        "100% of the time", "steps to create a successful", "www.sciencedirect.com", "birdtalking about the weather",
        "I's a bird, I's a bird,",
    ),
}  # fmt: skip
_BLANK = ("\n\n\n", " \n\n\n", "# 1000", "#include")
_ENDS = re.compile(r"Q:|I hope|#2:|Note")
_TOKEN = re.compile(r"\w+|[^\w\s]")
_MARKUP = re.compile(r"```|</?[a-zA-Z][^<>]*>|<!--|https?://|\bwww\.")
_SENTENCE = re.compile(r"\n|(?<=[.?!]) ")
_CAPTIONS = re.compile(r"\b(?:caption|description)s?\b", re.IGNORECASE)


@dataclass(frozen=True)
class Difference:
    """A cleaned text, or the name of the rule that rejects it; `text` is then what the rule looked at."""

    text: str
    rule: str | None = None


def read_difference(
    raw: str, captions: Sequence[str] = (), mode: FilterMode = "recommended", prompt: str = ""
) -> Difference:
    """Clean up an answer, or say why it is not used.

    Args:
        raw: the answer.
        captions: the two descriptions that it is about; only `recommended` looks at them.
        prompt: the question as it was asked; only `recommended` looks at it.
        mode: compat: the rules of the released code, made for Llama 2 and English. recommended: for any model.
    """
    if mode == "compat":
        if (rule := _compat(raw)) is not None:
            return Difference(raw, rule)
        text = _tidied(raw, "")
        return Difference(text, "too_short" if len(text) < LEAST_CHARACTERS else None)
    text = _tidied(raw, " ")
    return Difference(text, _recommended(text, captions, prompt))


def _compat(raw: str) -> str | None:
    if raw.startswith(_BLANK):
        return "blank_start"
    if not raw.isascii():
        return "not_ascii"
    return next((rule for rule, literals in _COMPAT.items() if any(each in raw for each in literals)), None)


def _recommended(text: str, captions: Sequence[str], prompt: str) -> str | None:
    if is_refusal(text):
        return "refusal"
    if len(text) < LEAST_CHARACTERS:
        return "too_short"
    data = text.encode(errors="surrogatepass")
    if _gram_share(text) > GRAM_SHARE or len(zlib.compress(data)) < COMPRESSED * len(data) or is_loop(text):
        return "loop"
    if len(_TOKEN.findall(text)) > MOST_TOKENS:
        return "too_long"
    if _MARKUP.search(text):
        return "markup"
    if _CAPTIONS.search(text):
        return "speaks_of_captions"
    if _copies(text, captions):
        return "copies_caption"
    return "copies_prompt" if _copies(text, _SENTENCE.split(prompt)) else None


def _copies(text: str, others: Iterable[str]) -> bool:
    own = set(words(text))
    return any(len(own & other) > COPIED * len(own | other) for other in (set(words(each)) for each in others))


def _tidied(raw: str, newline: str) -> str:
    """Up to where the model begins something new, on one line; `newline` stands for a line's end."""
    found = _ENDS.search(raw)
    text = raw[: found.start() if found else None].strip()
    text = text.replace("#1:", "").replace("A: ", "").replace("#", "")
    text = text.replace("\n", newline).replace("\t", " ").replace("  ", " ").strip()
    return text.removeprefix(". ")


def _gram_share(text: str) -> float:
    """Share of the characters that the commonest three in a row cover."""
    gram, _ = Counter(text[at : at + 3] for at in range(len(text) - 2)).most_common(1)[0]
    covered = {at + step for at in range(len(text) - 2) if text.startswith(gram, at) for step in range(3)}
    return len(covered) / len(text)
