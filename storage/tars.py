"""Tar, read without trusting a byte of it and written the same on any day and machine.

Reading looks at headers only and goes forward only. Nothing is extracted, links and devices are passed over, and memory
does not depend on what a header claims.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import BinaryIO, NamedTuple

BLOCK = 512
_RECORD = 20 * BLOCK
_MAX_NAME = 1 << 20
"""Extended headers beyond this are passed over: no file name is so long."""
_REGULAR = b"0\x007"
_WITHOUT_DATA = b"123456"


class TarBroken(Exception):
    """The archive breaks off or is not a tar; the members before that point are sound."""


class Member(NamedTuple):
    """A regular file of an archive."""

    name: str
    """As stored, undecodable bytes as surrogates. Never to be used as a path."""
    offset: int
    """Of its first byte in the archive."""
    size: int
    """In bytes; of a member that is cut short, those that are there."""


def members(file: BinaryIO, total: int) -> Iterator[Member]:
    """The regular files of a tar of ``total`` bytes, in its order.

    Raises:
        TarBroken: saying where; after the last member that could be found.
    """
    if total == 0:
        raise TarBroken("it is empty")
    position = 0
    name: str | None = None
    extended: Mapping[str, bytes] = {}
    while position < total:
        header = _read(file, position, BLOCK)
        if header == bytes(BLOCK):
            return
        _check(header, position)
        kind, size = header[156:157], _number(header[124:136], position)
        position += BLOCK
        if kind in _WITHOUT_DATA:
            size = 0
        if kind == b"S" and header[482]:  # old sparse format: its map goes on behind the header
            while _read(file, position, BLOCK)[504]:
                position += BLOCK
            position += BLOCK
        if kind in b"xL" and size <= _MAX_NAME:
            body = _read(file, position, size)
            if kind == b"L":
                name = _text(body)
            else:
                extended = _records(body, position)
        elif kind in b"xLKg":
            pass
        else:
            size = _number_in_words(extended, "size", size, position)
            if kind in _REGULAR and not any(key.startswith("GNU.sparse") for key in extended):
                own = name if name is not None else _own_name(header)
                own = extended["path"].decode("utf-8", "surrogateescape") if "path" in extended else own
                yield Member(own, position, min(size, total - position))
            name, extended = None, {}
        if position + size > total:
            raise TarBroken(f"it ends at byte {total:,} in a member that should end at byte {position + size:,}")
        position += -(-size // BLOCK) * BLOCK


def member(name: str, data: bytes) -> tuple[bytes, bytes, bytes]:
    """Header, bytes and padding of a regular file without owner or time (POSIX ustar)."""
    own = name.encode("ascii")
    if len(own) > 100:
        raise ValueError(f"member name {name!r} is longer than 100 bytes")
    size = b"%011o" % len(data)
    header = b"%b%b%b%b%06o%b" % (
        own,
        bytes(100 - len(own)),
        _TO_SIZE,
        size + _TIME,
        _SUM + sum(own) + sum(size),
        _FROM_SUM,
    )
    return header, data, bytes(-len(data) % BLOCK)


def end(length: int) -> bytes:
    """What closes an archive of ``length`` bytes."""
    return bytes(2 * BLOCK + -(length + 2 * BLOCK) % _RECORD)


_TO_SIZE = b"0000644\x000000000\x000000000\x00"  # mode, owner, group
_TIME = b"\x0000000000000\x00"
_FROM_SUM = b"\0 " + (b"0" + bytes(100) + b"ustar\x0000").ljust(BLOCK - 156, b"\0")
_SUM = sum(_TO_SIZE) + sum(_TIME) + sum(_FROM_SUM[2:]) + 8 * 32


def _read(file: BinaryIO, position: int, size: int) -> bytes:
    file.seek(position)
    data = file.read(size)
    if len(data) != size:
        raise TarBroken(f"it ends at byte {position + len(data):,}, in the middle of a header")
    return data


def _check(header: bytes, position: int) -> None:
    stated = _number(header[148:156], position)
    if sum(header) - sum(header[148:156]) + 8 * 32 != stated:
        raise TarBroken("it is not a tar" if position == 0 else f"the header at byte {position:,} is damaged")


def _number(field: bytes, position: int) -> int:
    if field[0] & 0x80:
        if field[0] != 0x80:
            raise TarBroken(f"the header at byte {position:,} states a negative number")
        return int.from_bytes(field[1:], "big")
    octal = field.split(b"\0")[0].strip()
    if octal.strip(b"01234567"):  # Python would take a sign, and a negative size leads round in circles
        raise TarBroken(f"the header at byte {position:,} is damaged" if position else "it is not a tar")
    return int(octal or b"0", 8)


def _number_in_words(extended: Mapping[str, bytes], key: str, default: int, position: int) -> int:
    text = extended.get(key)
    if text is None:
        return default
    if not text.isdigit() or len(text) > 20:
        raise TarBroken(f"the extended header before byte {position:,} states {key} {text[:20]!r}")
    return int(text)


def _records(body: bytes, position: int) -> dict[str, bytes]:
    """Of a pax header: ``length key=value\\n``, again and again."""
    found: dict[str, bytes] = {}
    start = 0
    while start < len(body):
        space = body.find(b" ", start, start + 10)
        length = body[start : max(space, start)]
        stop = start + int(length) if length.isdigit() else start
        if not start < space < stop <= len(body):
            raise TarBroken(f"the extended header at byte {position:,} is damaged")
        key, _, value = body[space + 1 : stop - 1].partition(b"=")
        found[key.decode("utf-8", "replace")] = value
        start = stop
    return found


def _own_name(header: bytes) -> str:
    name = _text(header[:100])
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _text(field: bytes) -> str:
    return field.split(b"\0")[0].decode("utf-8", "surrogateescape")
