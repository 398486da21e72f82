"""Makes strangers' text safe to print: a name may move the cursor, be a command to what reads the log, or fill it."""

import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from tiedquiet.verdict import escaped

_MOST_OF_A_LINE = 2000
_MOST_OF_A_CELL = 120  # names; the last cell of a row says why
_MOST_OF_A_WHY = 600
_MOST_ROWS = 50  # of one kind
_FEW = 3
_COLOURS = {"red": "31", "green": "32", "yellow": "33"}


def printable(text: object, most: int = _MOST_OF_A_LINE) -> str:
    """Text as one line: what must not be printed is escaped, and what is too long is cut."""
    given = str(text)
    return escaped(given if len(given) <= most else given[: most - 3] + "...")


def few(names: list[str]) -> str:
    """The first of some names, in their order."""
    return ", ".join(names[:_FEW]) + ", ..." * (len(names) > _FEW)


def table(rows: Iterable[tuple[str, ...]], kind: int, every: bool) -> Iterator[str]:
    """Rows in columns: the first fifty of a kind, and a line that counts the rest.

    Args:
        rows: any, of equal length; their text is that of strangers.
        kind: the column that says which kind a row is of.
        every: leave none out.
    """
    kinds: dict[str, list[tuple[str, ...]]] = {}
    for row in rows:
        kinds.setdefault(row[kind], []).append(row)
    cells = [
        (*(printable(cell, _MOST_OF_A_CELL) for cell in row[:-1]), printable(row[-1], _MOST_OF_A_WHY))
        for alike in kinds.values()
        for row in (alike if every else alike[:_MOST_ROWS])
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        yield "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True) if width).rstrip()
    for name, alike in kinds.items():
        if not every and len(alike) > _MOST_ROWS:
            yield f"  and {len(alike) - _MOST_ROWS:,} more {name}; --all lists them"


def coloured(text: str, colour: str, stream: Any = None) -> str:
    """Text in a colour, if the stream is a terminal with colours and `NO_COLOR` is not set."""
    stream = sys.stdout if stream is None else stream
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not is_terminal(stream)
    return text if plain else f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m"


def prepare(*streams: Any) -> None:
    """Keep streams from failing at a character that their encoding lacks."""
    for stream in streams:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def is_terminal(stream: Any) -> bool:
    """Whether a stream leads to a terminal."""
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):  # there is none, or it is closed
        return False
