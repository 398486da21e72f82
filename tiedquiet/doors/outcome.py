"""What follows from the findings of a load, in each mode: repair, log lines, dropped rows, and the error."""

import logging
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tiedquiet import mode, words
from tiedquiet.doors.wrapping import guarded
from tiedquiet.proof.load import Load
from tiedquiet.proof.missing import perhaps_unread
from tiedquiet.proof.repair import repair
from tiedquiet.verdict import WELL, Finding, LoadError


@dataclass
class Outcome:
    """What is to be done once a load has been judged.

    Attributes:
        missing: the missing keys that are not proven to be in the model after all.
        lines: what to say, with its level.
        failure: what to raise after that.
        arguments: what to call the wrapped function with, if it is called again.
        is_of_stage: whether each process has layers of its own, so that no other says what is said here.
    """

    missing: set[str] = field(default_factory=set)
    lines: list[tuple[int, str]] = field(default_factory=list)
    failure: LoadError | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    is_of_stage: bool = False


def conclude(load: Load, model: Any) -> Outcome:
    """Judge a load, repair what the mode says, and leave the record on the model."""
    findings = _judge_and_repair(load, model)
    wrong = {finding.key for finding in findings if finding.verdict not in WELL}
    load.mended = [finding for finding in load.mended if finding.key not in wrong]  # and was lost since
    outcome = outcome_of(model, load.where, findings, load.mended, load.reported, load.known.total if load.known else 0)
    load.close(model)
    return outcome


def left_missing(load: Load, model: Any) -> set[str]:
    """The keys about to be reported that are not in the model, as far as can be known before the load has ended."""
    with load.watch.aside():
        findings = _judge_and_repair(load, model)
    read_since = load.reading.beside.keys() - {finding.key for finding in findings}
    left = _left(findings, load.mended, load.reported) - read_since
    load.watch.go_on()
    load.dropped = load.reported - left
    return left


def _judge_and_repair(load: Load, model: Any) -> list[Finding]:
    load.is_strict = mode.current() == "strict"
    findings = load.findings(model)
    if mode.current() == "repair":
        findings, repaired = repair(load, model, findings)
        known = {finding.key for finding in repaired}
        load.mended = [finding for finding in load.mended if finding.key not in known] + repaired
    return findings


def _left(findings: list[Finding], repaired: list[Finding], missing: set[str]) -> set[str]:
    return missing - {f.key for f in repaired} - {f.key for f in findings if f.verdict in WELL}


def outcome_of(
    model: Any, where: object, findings: list[Finding], repaired: list[Finding], missing: set[str], total: int
) -> Outcome:
    """What there is to say about findings, and what is to be raised."""
    if not findings and not repaired:
        return Outcome(missing)
    mended = {finding.key for finding in repaired}
    broken = [f for f in findings if f.broken] if mode.current() == "strict" else []
    name = words.name_of(model, where)
    lines = [(logging.DEBUG, line) for line in words.unproven(findings)]
    if confirmed := words.confirmation([f for f in findings if f.key in missing - mended], repaired, fold):
        lines.append((logging.INFO, confirmed))
    loud = [f for f in findings if f not in broken]
    perhaps = words.hints(perhaps_unread(model, loud), fold)
    lines += [(logging.WARNING, line) for line in (*words.explanations(loud, fold, total), *perhaps)]
    failure = None
    if broken:
        failure = LoadError(f"{name}: {'; '.join(words.explanations(broken, fold, total))}", tuple(broken))
    left = _left(findings, repaired, missing)
    is_of_stage = hasattr(model, "_pp_stage")  # transformers' pipeline parallelism, from 5.24 on
    return Outcome(left, [(level, f"{name}: {line}") for level, line in lines], failure, is_of_stage=is_of_stage)


def carry_out(decide: Callable[[], Outcome | None], wrapped: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Call the wrapped function as an outcome says, or as it was called; say the lines; raise what is to be raised.

    Args:
        decide: what comes of it; None leaves the call as it is, and an error of ours does too.
        wrapped: the function.
        args: what it was called with.
        kwargs: what it was called with.
    """
    outcome, failure = guarded(decide)
    if outcome is None:
        result = wrapped(*args, **kwargs)
    else:
        failure = outcome.failure
        try:
            result = wrapped(**outcome.arguments)
        finally:
            say(outcome)
    if failure is not None:
        raise failure
    return result


def say(outcome: Outcome) -> None:
    """Say its lines."""
    for level, line in outcome.lines:
        guarded(partial(words.say, level, line, outcome.is_of_stage))


def fold(names: list[str]) -> Iterable[str]:
    """Fold numbered keys as the loading report does: `layers.{0, 1}...`."""
    try:
        return list(sys.modules["transformers.utils.loading_report"].update_key_name(names))
    except Exception:
        return names  # a private function of transformers: names that it cannot fold are given in full
