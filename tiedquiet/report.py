"""From verdicts to words: the confirmation line, the loud lines, TieError."""

import logging
import threading
from collections.abc import Callable, Iterable, Sequence

from tiedquiet.mode import is_main_process
from tiedquiet.proof import Finding, Tie, Verdict

Fold = Callable[[list[str]], Iterable[str]]

log = logging.getLogger("tiedquiet")
LOUD = (Verdict.UNTIED, Verdict.OVERWRITTEN, Verdict.AMBIGUOUS)
_AT_MOST = 8
_handler_lock = threading.Lock()


class TieError(RuntimeError):
    """A tie is broken and the mode is `strict`.

    Attributes:
        ties: the broken ones, each with its key, source and verdict.
    """

    def __init__(self, message: str, ties: Sequence[Tie] = ()) -> None:
        super().__init__(message)
        self.ties = tuple(ties)


def confirmation(model: object, where: object, proven: list[Finding], repaired: list[Finding], fold: Fold) -> str:
    """The line that stands in place of MISSING rows that were proven false."""
    mended = {finding.tie.key for finding in repaired}
    parts = []
    if found := [f for f in proven if f.tie.key not in mended]:
        parts.append(f"reported missing but tied to what was loaded: {_pairs(found, 'is', fold)}")
    if repaired:
        parts.append(f"not tied by transformers, repaired: {_pairs(repaired, 'is now', fold)}")
    return f"{_where(model, where)}: {'; '.join(parts)}"


def loud_lines(model: object, where: object, findings: list[Finding], fold: Fold) -> list[str]:
    """One line per loud verdict and cause, with the cure."""
    kinds: dict[tuple[Verdict, str], list[Finding]] = {}
    for finding in findings:
        if finding.tie.verdict in LOUD:
            kinds.setdefault((finding.tie.verdict, finding.why), []).append(finding)
    return [f"{_where(model, where)}: {_explain(*kind, some, fold)}" for kind, some in kinds.items()]


def _explain(verdict: Verdict, why: str, findings: list[Finding], fold: Fold) -> str:
    if verdict is Verdict.UNTIED:
        cause = f"because {why}" if why else "although its config asks for it"
        return (
            f"untied, values are NOT from the checkpoint: {_pairs(findings, 'is not', fold)}, {cause}. "
            "If it should be one tensor, set TIEDQUIET=repair or correct config.json; "
            "ignore this only if you mean to train it from scratch"
        )
    if verdict is Verdict.OVERWRITTEN:
        keys = _join(fold(sorted({f.tie.key for f in findings})))
        return (
            f"overwritten, stored values were LOST after they were loaded: {keys}. "
            "Use another transformers release (modules shared in __init__ are safe from 5.13.1 on), "
            "or copy the stored tensor back with load_state_dict(..., strict=False)"
        )
    return (
        f"ambiguous, the checkpoint stores two different tensors for one tie: {_pairs(findings, 'follows', fold)}, "
        f"not {why}. Find out which one the model was trained with and store it under the missing key"
    )


def unproven_lines(model: object, where: object, findings: list[Finding]) -> list[str]:
    """For DEBUG: why a row stays although a tie may hold."""
    return [
        f"{_where(model, where)}: unproven: {f.tie.key}: {f.why}" for f in findings if f.tie.verdict is Verdict.UNPROVEN
    ]


def say(level: int, message: str) -> None:
    """Log on `tiedquiet`, on rank 0; to stderr while nobody has configured logging for it."""
    import sys

    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        if distributed.get_rank() != 0:
            return
    elif not is_main_process():
        return
    if log.hasHandlers():
        log.log(level, message)
        return
    with _handler_lock:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("[tiedquiet] %(levelname)s %(message)s"))
        previous = log.level
        log.addHandler(handler)
        try:
            if previous == logging.NOTSET:
                log.setLevel(logging.INFO)
            log.log(level, message)
        finally:
            log.setLevel(previous)
            log.removeHandler(handler)


def _where(model: object, where: object) -> str:
    return f"{type(model).__name__} from {where}" if where else type(model).__name__


def _pairs(findings: list[Finding], verb: str, fold: Fold) -> str:
    return _join(fold([f"{f.tie.key} {verb} {f.tie.source}" for f in sorted(findings, key=lambda f: f.tie.key)]))


def _join(folded: Iterable[str]) -> str:
    items = list(folded)
    more = f" and {len(items) - _AT_MOST} more" if len(items) > _AT_MOST else ""
    return ", ".join(items[:_AT_MOST]) + more
