"""Patterns that strangers wrote: adapters and quantisers search names with them, and some searches never end.

Python's `re` tries one way after the other. Where what repeats has a repetition or a choice in it, the number of ways
doubles with every letter: `(a+)+b` takes years for a name of fifty. Such a pattern is refused.
"""

import re
from dataclasses import dataclass

ENDLESS = "has {}, a pattern whose search may never end; --trust-remote-code allows it"
_MOST = 4  # repetitions, one behind the other: each multiplies the ways by the length of a name
_SKIPPED = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)  # what stands for one letter
_COMMENT = re.compile(r"\(\?#(?:\\.|[^)\\])*\)?", re.DOTALL)
_VERBOSE = re.compile(r"\(\?[a-zA-Z]*x")  # from here on, what follows a # is a comment
_REPEATED = re.compile(r"(?:[*+?]|\{(?:\d+(?:,\d*)?|,?\d*)\})[?+]?")  # each in time that grows with its length


@dataclass
class _Group:
    """What was seen of a part in parentheses: repetitions in this alternative, and at most in one; any alternatives."""

    count: int = 0
    most: int = 0
    is_choice: bool = False


def endless(value: object) -> str:
    """The first of some texts, at any depth of objects and lists, that is a pattern of that kind; else empty."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str) and _is_endless(one):
            return one
        if isinstance(one, dict):
            waiting += [*one, *one.values()]
        elif isinstance(one, list):
            waiting += one
    return ""


def _is_endless(text: str) -> bool:
    groups, inner, place = [_Group()], _Group(), 0  # `inner` is what a repetition here would repeat
    while place < len(text):
        group, letter = groups[-1], text[place]
        if _VERBOSE.match(text, place):
            return True
        if comment := _COMMENT.match(text, place):
            place = comment.end()
        elif letter == "(":
            groups.append(_Group())
            place += 2 if text[place + 1 : place + 2] == "?" else 1
            inner = _Group()
        elif letter == ")" and len(groups) > 1:
            inner = groups.pop()
            inner.most = max(inner.most, inner.count)
            groups[-1].count += inner.most
            groups[-1].is_choice |= inner.is_choice
            place += 1
        elif letter == "|":
            group.most, group.count, group.is_choice = max(group.most, group.count), 0, True
            place += 1
        elif found := _REPEATED.match(text, place):
            if (inner.most or inner.is_choice) and letter != "?":
                return True
            group.count += 1
            inner, place = _Group(), found.end()
        else:
            skipped = _SKIPPED.match(text, place)
            if skipped is None and letter == "[":
                return False  # what has no end is no pattern, and to look for its end each time would take as long
            inner, place = _Group(), skipped.end() if skipped else place + 1
        if groups[-1].count > _MOST:
            return True
    return False
