"""The messages: from findings to log lines, and where these go."""

import logging
import re
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress

from tiedquiet.mode import current, is_main_process
from tiedquiet.verdict import BUFFER, KEPT_OUT, LOOSE, LOUD, ONE_OF_TWO, Finding, Verdict, escaped

log = logging.getLogger("tiedquiet")
_theirs = logging.getLogger("transformers")
_AT_MOST = 8
_SKIP = (
    "Set TIEDQUIET=repair to keep what was stored, or make that code skip loaded tensors, as the functions of "
    "transformers.initialization do"
)
_COMPUTE = "Set TIEDQUIET=repair, or compute them in _init_weights too"
_REGISTER = "Set TIEDQUIET=repair, or register them as buffers and compute them in _init_weights too"

Fold = Callable[[list[str]], Iterable[str]]


def confirmation(findings: list[Finding], repaired: list[Finding], fold: Fold) -> str:
    """The line that replaces the rows proven false, and says what was repaired; empty if there is neither."""
    of = {v: [f for f in findings if f.verdict is v] for v in (Verdict.TIED, Verdict.COPIED)}
    parts = [
        ("reported missing but tied to what was loaded: ", _pairs(of[Verdict.TIED], "is", fold)),
        (
            "reported missing but equal to what was loaded, in a separate tensor, so training will drive them apart: ",
            _pairs(of[Verdict.COPIED], "is a copy of", fold),
        ),
    ]
    for why, some in _by_cause(f for f in repaired if f.verdict is Verdict.UNREAD):
        parts.append((f"read by TIEDQUIET=repair, {why}: ", _pairs(some, "from", fold)))
    tied = [f for f in repaired if f.verdict in (Verdict.UNTIED, Verdict.COPIED)]
    parts.append(("not tied by transformers, repaired: ", _pairs(tied, "is now", fold)))
    for by, some in _by_cause(f for f in repaired if f.verdict is Verdict.OVERWRITTEN):
        parts.append((f"kept as stored, although overwritten {by}: ", _keys(some, fold)))
    unwritten = [f for f in repaired if f.verdict is Verdict.UNWRITTEN]
    parts.append(("never written by transformers, repaired with what __init__ computes: ", _keys(unwritten, fold)))
    return "; ".join(start + names for start, names in parts if names)


def explanations(findings: Iterable[Finding], fold: Fold, total: int = 0) -> list[str]:
    """One or two sentences for each verdict that is a WARNING, and each cause: what is wrong, why, and what to do.

    Args:
        findings: any.
        fold: folds numbered names.
        total: how many tensors the state dict has.
    """
    lines = []
    for verdict in LOUD:
        some = [finding for finding in findings if finding.verdict is verdict]
        if verdict is Verdict.OVERWRITTEN:
            for cure in dict.fromkeys(finding.cure for finding in some):
                alike = _by_cause(finding for finding in some if finding.cure == cure)
                where = ", ".join(f"{_keys(lost, fold)} {why}" for why, lost in alike)
                lines.append(
                    f"overwritten, stored values were LOST after they were read: {where}. {_left_to_do(cure or _SKIP)}"
                )
        else:
            for broken, cure in sorted({(finding.broken, finding.cure): None for finding in some}, key=_is_passed):
                causes = _by_cause(f for f in some if (f.broken, f.cure) == (broken, cure))
                lines += [_explain(verdict, why, alike, fold, total) for why, alike in causes]
    return lines


def _left_to_do(cure: str) -> str:
    """A cure; in `repair`, which has done what it could, without the advice to set that."""
    if current() != "repair":
        return cure
    cure = re.sub(r"\bset TIEDQUIET=repair or ", "", cure)
    cure = re.sub(r"\bSet TIEDQUIET=repair(?: to [a-z ]+)?, or (\w)", lambda found: found[1].upper(), cure)
    cure = re.sub(r"\b[Ss]et (TIEDQUIET=repair) to ", r"\1 did not ", cure)
    return re.sub(r"\b[Ss]et (TIEDQUIET=repair)", r"\1 did not mend it", cure)


def _explain(verdict: Verdict, why: str, findings: list[Finding], fold: Fold, total: int) -> str:
    cure = _left_to_do(findings[0].cure)
    if verdict is Verdict.UNREAD and not findings[0].key:
        return f"unread, {why}. {cure}"
    if verdict is Verdict.UNREAD and findings[0].source is None:
        return f"unread, {_keys(findings, fold)}: {why}. {cure}"
    if verdict is Verdict.UNREAD:
        was, them = ("was", "it") if len(findings) == 1 else ("were", "them")
        return (
            f"unread, {len(findings):,} of {total:,} tensors {was} NOT read, although the checkpoint has {them}: "
            f"{_pairs(findings, 'is', fold)} there, {why}. {cure}"
        )
    if verdict is Verdict.UNTIED and not findings[0].broken:
        return (
            f"untied, values are NOT from the checkpoint: {_pairs(findings, 'is not', fold)}, {why}, so it is a new "
            "head. Load a checkpoint that has the head, or train it"
        )
    if verdict is Verdict.UNTIED:
        return (
            f"untied, values are NOT from the checkpoint: {_pairs(findings, 'is not', fold)}, {why}. "
            f"{cure}; ignore this only if you mean to train it from scratch"
        )
    if verdict is Verdict.AMBIGUOUS and not findings[0].key:
        return f"ambiguous, {why}. {cure}"
    if verdict is Verdict.AMBIGUOUS and findings[0].source is None:
        return (
            f"ambiguous, two files of the checkpoint have different values: {_keys(findings, fold)}: {why}. "
            "Find out which file is right, and delete these keys from the other"
        )
    if verdict is Verdict.AMBIGUOUS and cure:
        return f"ambiguous, {_pairs(findings, 'is not', fold)}: {why}. {cure}"
    if verdict is Verdict.AMBIGUOUS:
        return (
            "ambiguous, the checkpoint stores two different tensors where the model has one: "
            f"{_pairs(findings, 'has the values of', fold)}{why and ': ' + why}. {ONE_OF_TWO}"
        )
    if why == BUFFER:
        return (
            f"unwritten, uninitialised memory: {_keys(findings, fold)}. transformers 5 re-allocates such buffers and "
            f"discards what __init__ computed. {_left_to_do(_COMPUTE)}"
        )
    if why == LOOSE:
        return (
            f"unwritten, on meta, where nothing has values: {_keys(findings, fold)}. transformers 5 builds a model on "
            "meta and moves only what a module registers; with the rest torch may compute garbage without an error. "
            f"{cure or _left_to_do(_REGISTER)}"
        )
    if why == KEPT_OUT:
        return (
            f"unwritten, on meta, where nothing has values: {_keys(findings, fold)}. Its class keeps it out of its "
            "state dict, so transformers neither reads nor initialises it. Put it back in, or make it after loading"
        )
    return (
        f"unwritten, uninitialised memory: {_keys(findings, fold)}; nothing was read into it, and no initialiser wrote "
        "to it. Load a checkpoint that has it, or initialise it after loading"
    )


def hints(findings: list[Finding], fold: Fold) -> list[str]:
    """What is missing and may be in the checkpoint under another name: likely, but not claimed."""
    if not findings:
        return []
    it = "it" if len(findings) == 1 else "them"
    return [
        f"missing, but perhaps in the checkpoint under another name: {_pairs(findings, 'may be', fold)}, which nothing "
        f"read. If so, rename {it} in the file, or load this checkpoint by from_pretrained with a key_mapping for {it}"
    ]


def unproven(findings: list[Finding]) -> list[str]:
    """For DEBUG: what cannot be known and why."""
    return [f"unproven: {f.key}: {f.why}" for f in findings if f.verdict is Verdict.UNPROVEN]


def name_of(model: object, where: object) -> str:
    """What a line begins with."""
    return f"{type(model).__name__} from {where}" if where else type(model).__name__


def few(names: Iterable[str], fold: Fold = list) -> str:
    """The first few names, folded, and how many more there are."""
    return _first(list(fold(sorted(set(names)))))


def say(level: int, message: str, on_each_rank: bool = False) -> None:
    """Log on `tiedquiet`, on rank 0 unless ranks differ; to stderr unless logging is configured for it.

    What is said to be lost is seen wherever transformers' own warnings are: these have a level and a handler of their
    own, which a configuration of logging leaves as they are. And whatever that configuration does, no load fails.
    """
    if not (on_each_rank or _is_first_rank()) or not _is_wanted(level):
        return
    record = logging.LogRecord(log.name, level, __file__, 0, escaped(message), (), None)
    with suppress(Exception):  # of a filter or a handler of the program's
        made = log.makeRecord(log.name, level, __file__, 0, record.msg, (), None, "say")
        if not (passed := log.filter(made)):
            return
        record = passed if isinstance(passed, logging.LogRecord) else made  # from Python 3.12 on
        if _is_configured(level):
            log.callHandlers(record)
            return
    # A handler of its own, never attached: another thread's line would find it, or miss it.
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("[tiedquiet] %(levelname)s %(message)s"))
    handler.handle(record)


def _is_wanted(level: int) -> bool:
    """Whether such a line is to be heard: by the level of its logger, or else by what is heard of transformers."""
    if level <= log.manager.disable or (log.level == logging.NOTSET and _theirs.getEffectiveLevel() > logging.WARNING):
        return False
    if level >= logging.WARNING:
        # Not by the root logger's level, nor by `disabled`: `dictConfig` sets that on loggers that it does not name.
        return level >= log.level
    return not log.disabled and level >= (log.getEffectiveLevel() if log.hasHandlers() else log.level or logging.INFO)


def _is_configured(level: int) -> bool:
    """Whether logging's handlers are to have a line: one that says what is lost, only if one of them takes it."""
    if level < logging.WARNING or log.handlers:
        return log.hasHandlers()
    everywhere = logging.root.handlers if log.propagate else []
    return any(level >= one.level and not isinstance(one, logging.NullHandler) for one in everywhere)


def _is_first_rank() -> bool:
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return bool(distributed.get_rank() == 0)
    return is_main_process()


def _by_cause(findings: Iterable[Finding]) -> list[tuple[str, list[Finding]]]:
    causes: dict[str, list[Finding]] = {}
    for finding in findings:
        causes.setdefault(_lost_to(finding)[1] if _is_of_two(finding) else finding.why, []).append(finding)
    return list(causes.items())


def _is_of_two(finding: Finding) -> bool:
    """Whether the files have two tensors for one of the model's: what it lost to differs from key to key."""
    return finding.verdict is Verdict.AMBIGUOUS and bool(finding.key and finding.source and not finding.cure)


def _lost_to(finding: Finding) -> tuple[str, str]:
    """What the reason says of this key alone, and the rest of it."""
    own, _, rest = finding.why.partition(": ")
    return own, rest


def _is_passed(kind: tuple[bool, str]) -> bool:
    return not kind[0]


def _first(items: list[str]) -> str:
    more = f" and {len(items) - _AT_MOST} more" if len(items) > _AT_MOST else ""
    return ", ".join(items[:_AT_MOST]) + more


def _pairs(findings: list[Finding], verb: str, fold: Fold) -> str:
    """Each key with its source; of many that differ in the same prefix, the first, and how many are like it."""
    pairs = {
        f"{f.key} {verb} {f.source}" + (f", {_lost_to(f)[0]}" if _is_of_two(f) else ""): _prefixes(f.key, str(f.source))
        for f in findings
    }
    if len(items := list(fold(sorted(pairs)))) <= _AT_MOST:
        return ", ".join(items)
    alike: dict[tuple[str, str], list[str]] = {}
    for pair in sorted(pairs):
        alike.setdefault(pairs[pair], []).append(pair)
    several = sorted((-len(some), some[0], *prefixes) for prefixes, some in alike.items() if len(some) > 1)
    alone = fold([some[0] for some in alike.values() if len(some) == 1])
    return _first([*(_likewise(-count, *first) for count, *first in several), *alone])


def _likewise(count: int, first: str, ours: str, theirs: str) -> str:
    prefix = ours or theirs
    return f"{first} and {count - 1} more{f' of {prefix}.*' if prefix else ''} likewise"


def _prefixes(key: str, source: str) -> tuple[str, str]:
    """What is left of two names without the parts at their ends that are the same."""
    ours, theirs = key.split("."), source.split(".")
    while ours and theirs and ours[-1] == theirs[-1]:
        ours.pop(), theirs.pop()
    return ".".join(ours), ".".join(theirs)


def _keys(findings: list[Finding], fold: Fold) -> str:
    followers = [f for f in findings if f.source not in (None, f.key)]
    keys = few([f.key for f in findings if f not in followers] or [str(f.source) for f in followers], fold)
    return keys + (f" (and with it {few([f.key for f in followers], fold)})" if followers else "")
