"""What all pages share: a template filled under a strict policy, untrusted text made harmless, numbers, pictures.

Every text is untrusted (a language model wrote it, or a stranger named the file), so all of it is escaped, isolated
from the direction of its neighbours, freed of invisible characters and clipped. A strict content security policy, with
the hashes of the one style sheet and the one script, is the second line of defence.
"""

import base64
import functools
import hashlib
import math
import unicodedata
from io import BytesIO
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image, UnidentifiedImageError

from latteflow.models.towers.images import to_rgb

NAME_LIMIT = 64
TEXT_LIMIT = 180
"""Characters of a text that show before the reader opens it."""
OPEN_TEXT_LIMIT = 2_000
"""Characters of a text that the page holds at all; the store has the rest."""


def html(template: str, *, live: str | None = None, **view: Any) -> str:
    """A template of this folder, filled. Its policy lets a browser run our own style and script, and fetch nothing.

    Args:
        live: a further script, of a page that a service of ours shows: it may ask that service, and nobody else.
    """
    folder = Path(__file__).parent
    css, *scripts = (
        (folder / name).read_text(encoding="utf-8") for name in ("page.css", "page.js", *filter(None, [live]))
    )
    js = "\n".join(scripts)
    if "</style" in css.lower() or "</script" in js.lower():
        raise ValueError("style and scripts are inlined and must not hold a closing style or script tag")
    policy = [
        "default-src 'none'",
        *(["img-src 'self' data:", "connect-src 'self'"] if live else ["img-src data:"]),
        f"style-src 'sha256-{_sha256(css)}'",
        f"script-src 'sha256-{_sha256(js)}'",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    found = _templates(folder).get_template(template)
    return found.render(css=Markup(css), js=Markup(js), policy="; ".join(policy), **view).strip() + "\n"


@functools.cache
def _templates(folder: Path) -> Environment:
    found = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {
        "name": name_html, "plain": plain, "clean": clean, "percent": percent, "points": points, "number": number,
        "decimal": decimal, "duration": duration, "p_value": p_value, "thumbnail": thumbnail_html,
    }  # fmt: skip
    return found


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


# Untrusted text


def clean(text: str, limit: int = OPEN_TEXT_LIMIT) -> str:
    """At most ``limit`` characters of ``text`` with nothing in them that hides, reorders or piles up.

    Invisible and direction-changing characters become ``[U+202E]``, so a reader sees that they are there; joiners stay
    where scripts and emoji need them, between two non-ASCII characters. Runs of combining marks are cut to six.
    """
    clipped = text[:limit] + ("…" if len(text) > limit else "")
    if clipped.isascii() and clipped.isprintable():
        return clipped
    out: list[str] = []
    marks = 0
    for before, char, after in zip(" " + clipped, clipped, clipped[1:] + " ", strict=False):
        category = unicodedata.category(char)
        marks = marks + 1 if category in ("Mn", "Me") else 0
        joins = char in "\u200c\u200d" and not before.isascii() and not after.isascii()
        hides = category in ("Cc", "Cf", "Cs", "Zl", "Zp") or ord(char) & 0xFFFE == 0xFFFE
        if hides and char not in "\n\t" and not joins:
            out.append(f"[U+{ord(char):04X}]")
        elif marks <= 6:
            out.append(char)
    return "".join(out)


def plain(text: str, limit: int = NAME_LIMIT) -> str:
    """``clean`` on one line, for attributes and chart labels; the marks of invisible characters count too."""
    shown = clean(" ".join(text.split()) or "(empty)", limit)
    return shown if len(shown) <= limit + 1 else shown[:limit] + "…"


def name_html(text: str, limit: int = NAME_LIMIT) -> Markup:
    """A class name, path or other short text, isolated; more of it in the tooltip where it had to be clipped."""
    title = Markup(' title="{}"').format(plain(text, 400)) if len(text) > limit else ""
    return Markup("<bdi{}>{}</bdi>").format(title, plain(text, limit))


# Numbers


def percent(share: float | None, digits: int = 1) -> str:
    return _signless(share, 100, digits) + "%" if _known(share) else "–"


def points(share: float | None, digits: int = 1) -> str:
    """A difference in percentage points with its sign: ``+4.8``, ``−0.3``, ``0.0``."""
    return _signed(f"{100 * share:+.{digits}f}") if share is not None and math.isfinite(share) else "–"


def number(value: float | None) -> str:
    return f"{value:,.0f}".replace("-", "−") if value is not None and math.isfinite(value) else "–"


def decimal(value: float | None, digits: int = 3) -> str:
    return _signless(value, 1, digits) if _known(value) else "–"


def p_value(value: float | None) -> str:
    """``0.03``, and ``< 0.001`` for what is smaller."""
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _signless(value: float | None, factor: int, digits: int) -> str:
    assert value is not None
    return f"{factor * value + 0.0:.{digits}f}".replace("-", "−")


def _signed(text: str) -> str:
    return text[1:] if not text.strip("+-0.") else text.replace("-", "−")


# Pictures


def thumbnail(image: Image.Image, side_px: int) -> bytes:
    """A picture for the page, no side longer than ``side_px``: PNG where it is tiny, to stay crisp, else JPEG."""
    small = to_rgb(image).copy()
    small.thumbnail((side_px, side_px))
    out = BytesIO()
    small.save(out, "PNG" if max(small.size) <= 64 else "JPEG", quality=80)
    return out.getvalue()


def picture_url(data: bytes) -> str:
    """PNG or JPEG bytes, as an address that holds them."""
    return data_url("image/png" if data.startswith(b"\x89PNG") else "image/jpeg", data)


def thumbnail_html(data: bytes, path: str, alt: str) -> Markup:
    """A picture with its size, and crisp pixels where it is tiny."""
    try:
        image = Image.open(BytesIO(data))
    except UnidentifiedImageError as error:
        raise ValueError(f"{path!r}: the example image is not a picture; give PNG, JPEG or WebP bytes") from error
    if image.format not in ("PNG", "JPEG", "WEBP"):
        raise ValueError(f"{path!r}: the example image is {image.format}; give PNG, JPEG or WebP bytes")
    return Markup('<img class="{}" width="{}" height="{}" src="{}" alt="{}">').format(
        "tiny" if max(image.size) < 80 else "photo", *image.size,
        data_url(f"image/{image.format.lower()}", data), alt,
    )  # fmt: skip


def data_url(media_type: str, data: bytes) -> str:
    """Bytes as an address that holds them."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"
