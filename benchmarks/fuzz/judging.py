"""Every verdict of one load against the truth."""

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.fuzz import draw
from benchmarks.fuzz.cause import cause
from benchmarks.fuzz.files import Files
from benchmarks.fuzz.loading import Loaded
from benchmarks.fuzz.plan import Plan
from benchmarks.fuzz.truth import Truth
from tiedquiet import LoadError, Proof, Verdict

CONFIRMED = {Verdict.TIED, Verdict.COPIED}
LOUD = {Verdict.UNREAD, Verdict.UNTIED, Verdict.OVERWRITTEN, Verdict.UNWRITTEN, Verdict.AMBIGUOUS}
FAULTS = (
    "hidden",
    "missed",
    "passed by strict",
    "false alarm",
    "raised for nothing",
    "repaired wrongly",
    "fell aside",
    "broke",
)


HARM = ("lost", "unread", "untied", "unwritten", "follows what is lost", "missing")


@dataclass
class Judged:
    """One load, judged.

    Attributes:
        plan: what it is made of.
        faults: what was wrong, as kind, mode, name, what is true, what was said, and the likely cause.
        counts: truths, those that were told, rows, and what was seen of what nobody can see.
        unproven: reasons for which it was said that something cannot be known.
        skipped: why transformers does not load it without tiedquiet either.
    """

    plan: Plan
    faults: list[list[str]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    unproven: Counter[str] = field(default_factory=Counter)
    skipped: str = ""

    def add(self, fault: str, mode: str, name: str = "", truth: str = "", said: str = "") -> None:
        assert fault in FAULTS
        self.faults.append([fault, mode, name, truth, said, cause(self.plan, name)])


def judged(seed: int, scratch: str | None = None) -> Judged:
    """Draw, write, load in every mode, and judge."""
    plan = draw.plan(seed)
    with _folders(scratch) as (folder, offloaded):
        return _judge(plan, Files(plan, folder), offloaded)


def explained(seed: int, scratch: str | None = None) -> tuple[Judged, str]:
    """The same, and in words what was drawn, what is true in each mode, and what was said."""
    plan = draw.plan(seed)
    lines = [*(f"{name}: {value}" for name, value in vars(plan).items()), ""]
    with _folders(scratch) as (folder, offloaded):
        files = Files(plan, folder)
        for mode in ("off", "on", "repair", "strict"):
            load = Loaded(plan, files, mode, offloaded)
            lines.append(f"{mode}: missing {sorted(load.missing)}, in the report {sorted(load.rows)}")
            if load.error is not None:
                lines.append(f"  {type(load.error).__name__}: {load.error}")
            if load.model is not None:
                facts = Truth(plan, files, load).facts
                lines += [f"  true: {name}: {facts[name].state}" for name in sorted(facts)]
                lines += [f"  {line}" for line in str(load.proof or "").splitlines()]
        return _judge(plan, files, offloaded), "\n".join(lines)


@contextmanager
def _folders(scratch: str | None) -> Iterator[tuple[Path, Path]]:
    folder = Path(tempfile.mkdtemp(dir=scratch))
    try:
        for name in ("files", "offloaded"):
            (folder / name).mkdir()
        yield folder / "files", folder / "offloaded"
    finally:
        shutil.rmtree(folder)


def _judge(plan: Plan, files: Files, scratch: Path) -> Judged:
    result = Judged(plan)
    loads = {mode: Loaded(plan, files, mode, scratch) for mode in ("on", "repair", "strict")}
    failed = [mode for mode, load in loads.items() if load.error is not None and not load.raised]
    if failed:
        without = Loaded(plan, files, "off", scratch).error
        if without is not None:
            result.skipped = f"{type(without).__name__}: {str(without)[:80]}"
            return result
        for mode in failed:
            error = loads[mode].error
            result.add("broke", mode, "", "loads without tiedquiet", f"{type(error).__name__}: {str(error)[:200]}")
    for mode, load in loads.items():
        if load.fell_aside or "tiedquiet failed" in str(load.error or ""):
            result.add("fell aside", mode, "", "", load.fell_aside or str(load.error)[:200])
        if load.raised and mode != "strict":
            result.add("broke", mode, "", "mode is not strict", str(load.error)[:200])
    on, repair, strict = loads.values()
    if on.model is None or on.proof is None:
        return result
    truth = Truth(plan, files, on)
    _judge_on(result, truth, on)
    _judge_strict(result, truth, on, strict)
    if repair.model is not None and repair.proof is not None:
        _judge_repair(result, truth, on, Truth(plan, files, repair), repair)
    return result


def findings_of(proof: Proof) -> dict[str, set[Verdict]]:
    found: dict[str, set[Verdict]] = {}
    for finding in proof.findings:
        found.setdefault(finding.key, set()).add(finding.verdict)
    return found


def _said(said: dict[str, set[Verdict]], name: str) -> str:
    return ", ".join(sorted(str(verdict) for verdict in said.get(name, ()))) or "nothing"


def _is_told(said: dict[str, set[Verdict]], name: str, group: frozenset[str]) -> bool:
    return any(said.get(each, set()) - CONFIRMED for each in (name, *group))


def _judge_on(result: Judged, truth: Truth, on: Loaded) -> None:
    assert on.proof is not None
    said = findings_of(on.proof)
    for finding in on.proof.findings:
        if finding.verdict is Verdict.UNPROVEN:
            result.unproven[finding.why] += 1
    for name, fact in truth.facts.items():
        result.counts["names"] += 1
        if fact.is_bad:
            result.counts["truths"] += 1
            if _is_told(said, name, fact.group):
                result.counts["told"] += 1
            elif fact.blind:
                result.counts["unseen"] += 1
            else:
                result.add("missed", "on", name, fact.state, _said(said, name))
        loud = said.get(name, set()) & LOUD
        drawn = fact.state == "missing" and Verdict.UNWRITTEN in loud
        false = (not fact.is_bad and fact.state != "open") or drawn
        if (false and loud) or (fact.state in ("held", "right") and Verdict.MISSING in said.get(name, ())):
            result.add("false alarm", "on", name, fact.state, _said(said, name))
    if truth.plan.way.device_map == "meta" and on.proof.ok:
        result.add("missed", "on", "", "everything is on meta", "ok")
    for name in said.keys() - truth.facts.keys() - {""}:
        result.add("false alarm", "on", name, "no such name", _said(said, name))
    _judge_rows(result, "on", truth, on)
    if truth.is_sound and not on.proof.ok and not any(fault[0] == "false alarm" for fault in result.faults):
        result.counts["sound, and not ok"] += 1


def _judge_rows(result: Judged, mode: str, truth: Truth, load: Loaded) -> None:
    assert load.proof is not None
    said = findings_of(load.proof)
    for name in load.missing - load.rows:
        fact = truth.facts.get(name)
        # What was true when the report was made, and is told to be no longer, is no row hidden.
        if fact is not None and fact.is_bad and not fact.blind and not _is_told(said, name, frozenset()):
            result.add("hidden", mode, name, fact.state, "its row is gone")


def _judge_strict(result: Judged, truth: Truth, on: Loaded, strict: Loaded) -> None:
    assert on.proof is not None
    facts = truth.facts
    must = [n for n, fact in facts.items() if fact.must_raise and fact.is_bad and not fact.blind]
    may = any(fact.state == "open" or (fact.is_bad and fact.must_raise is not False) for fact in facts.values())
    said = findings_of(on.proof)
    # An error of ours is raised as well, without findings: that is counted as what it is.
    if isinstance(strict.error, LoadError) and strict.error.findings and not may:
        first = strict.error.findings[0]
        result.add("raised for nothing", "strict", first.key, "sound", str(first.verdict))
    if not strict.raised and strict.error is None:
        unproven = all(said.get(name) == {Verdict.UNPROVEN} for name in must)
        if must and not unproven:
            result.add("passed by strict", "strict", must[0], facts[must[0]].state, _said(said, must[0]))


def _judge_repair(result: Judged, before: Truth, on: Loaded, truth: Truth, repair: Loaded) -> None:
    assert on.proof is not None
    assert repair.proof is not None
    was, said = findings_of(on.proof), findings_of(repair.proof)
    for name, fact in truth.facts.items():
        earlier = before.facts.get(name)
        if earlier is None:
            continue
        told = _is_told(said, name, fact.group)
        if fact.is_bad and not fact.blind and not told and _is_told(was, name, earlier.group):
            result.add("repaired wrongly", "repair", name, fact.state, _said(said, name))
        elif fact.state in HARM and earlier.state in ("held", "tied", "copied", "right"):
            result.add(
                "repaired wrongly", "repair", name, f"{earlier.state} before, {fact.state} now", _said(said, name)
            )
        elif fact.state == "right" and earlier.is_bad and not told and not fact.exact:
            result.add("repaired wrongly", "repair", name, "not what __init__ computes to the bit", _said(said, name))
        if earlier.is_bad and not fact.is_bad:
            result.counts["repaired"] += 1
        if said.get(name, set()) & LOUD and not fact.is_bad and fact.state != "open":
            result.add("false alarm", "repair", name, fact.state, _said(said, name))
    _judge_rows(result, "repair", truth, repair)


def as_line(result: Judged) -> dict[str, Any]:
    return {
        "seed": result.plan.seed,
        "kinds": sorted(result.plan.kinds),
        "faults": result.faults,
        "counts": dict(result.counts),
        "unproven": dict(result.unproven),
        "skipped": result.skipped,
    }
