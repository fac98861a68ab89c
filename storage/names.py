"""Names from outside as text that any terminal, table and JSON file can carry, and back again."""

from __future__ import annotations

import re

# Control characters, marks that change the direction of writing, bytes that are not UTF-8, and the backslash itself,
# so that no two names look the same.
_ODD = re.compile("[\\x00-\\x1f\\x7f-\\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\\\\]")
_ESCAPED = re.compile(r"\\(?:x([0-9a-f]{2})|u([0-9a-f]{4})|\\)")


def printable(name: str) -> str:
    """The name with ``\\xNN`` for odd bytes and ``\\uNNNN`` for odd characters; a backslash is doubled.

    Args:
        name: as the file system has it, undecodable bytes as surrogates (PEP 383).
    """
    plain = name.isascii() and name.isprintable() and "\\" not in name
    return name if plain else _ODD.sub(_escape, name)


def raw(printed: str) -> str:
    """The name that :func:`printable` was given."""
    return _ESCAPED.sub(_unescape, printed) if "\\" in printed else printed


def member_path(name: str) -> str:
    """The name of an archive's member as a printable path that leads nowhere but down."""
    parts = [printable(part) for part in name.split("/") if part not in ("", ".")]
    return "/".join(r"\x2e\x2e" if part == ".." else part for part in parts)


def _escape(found: re.Match[str]) -> str:
    character = found.group()
    code = ord(character)
    if character == "\\":
        return r"\\"
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x80 else f"\\u{code:04x}"


def _unescape(found: re.Match[str]) -> str:
    byte, character = found.groups()
    if byte is not None:
        code = int(byte, 16)
        return chr(code if code < 0x80 else 0xDC00 + code)
    return chr(int(character, 16)) if character is not None else "\\"
