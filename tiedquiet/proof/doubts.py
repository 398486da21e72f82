"""Whether what a rule of names leads to some keys may be another's: of a second copy of the model, most often."""

from collections import defaultdict

from tiedquiet.proof import names
from tiedquiet.proof.memory import equals, identical
from tiedquiet.proof.prefixes import starts
from tiedquiet.proof.reading import Reading


def doubts_of(reading: Reading, made: names.Made, unread: names.Headers) -> dict[str, str]:
    """Why what a rule leads to some keys may not be theirs, as a clause for each: nothing is read into them then.

    Args:
        reading: what was read, and found by other rules.
        made: what the rule makes of what.
        unread: what the files have and nothing read.
    """
    if reading.is_quantised:
        return {}
    if why := _leads_others_to_what_was_read(reading, made):
        return dict.fromkeys(made.origins, why)
    return _there_once_more(reading, made, unread) | _two_for_one(reading, made)


def _leads_others_to_what_was_read(reading: Reading, made: names.Made) -> str:
    """The rule leads other values to what was read already, or found by another rule; empty if not."""
    files = reading.checkpoint.tensors
    for name, key in made.leads.items():
        earlier = reading.found[key].source if key in reading.found else None
        other = key if key in reading.held else earlier
        there = reading.read_to[key] if key in reading.held else files[earlier]() if earlier in files else None
        if there is not None and equals(there, files[name]()) is False:
            return f"and {name} has other values than {other}"
    return ""


def _there_once_more(reading: Reading, made: names.Made, unread: names.Headers) -> dict[str, str]:
    """Most of what the rule takes from under a prefix is there once more, with other values, under another or none."""
    files, taken = reading.checkpoint.tensors, made.key_of
    others = defaultdict[str, list[str]](list)
    for name in unread.keys() - taken.keys() if made.prefixes else ():
        for start in ("", *starts(name)):
            others[name[len(start) :]].append(start)
    found: dict[str, str] = {}
    for old in made.prefixes:
        ends = [name[len(old) :] for name in taken if name.startswith(old)]
        again = defaultdict[str, list[str]](list)
        pairs = ((start, end) for end in ends for start in others.get(end, ()))
        for start, end in (pair for pair in pairs if unread["".join(pair)].shape == unread[old + pair[1]].shape):
            again[start].append(end)
        for start, some in again.items():
            differ = (start + end for end in some if not identical(files[start + end](), files[old + end]()))
            if 2 * len(some) > len(ends) and (one := next(differ, None)) is not None:
                keys = [key for key, origin in made.origins.items() if origin.names[0].startswith(old)]
                found |= dict.fromkeys(keys, f"and {one} is there as well, and has other values")
    return found


def _two_for_one(reading: Reading, made: names.Made) -> dict[str, str]:
    """The rule leads two different tensors to one key."""
    files, names_of = reading.checkpoint.tensors, defaultdict[str, list[str]](list)
    for name, key in made.leads.items():
        names_of[key].append(name)
    rivals: dict[str, str] = {}
    for key, origin in made.origins.items():
        first = origin.names[0]
        others = [] if origin.is_converted else [name for name in names_of[key] if name != first]
        if (rival := next((n for n in others if not identical(files[n](), files[first]())), None)) is not None:
            rivals[key] = rival
    if not rivals:
        return {}
    key, rival = next(iter(rivals.items()))
    # Where most are there twice, what is there once may be of either copy.
    either = made.origins if 2 * len(rivals) > len(made.origins) else rivals
    return dict.fromkeys(either, f"and {rival}, which may be {key} as well, has other values")
