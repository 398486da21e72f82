"""The report on a checkpoint: on each of its models, and on all of it."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tiedquiet.gate.printing import coloured, printable, table
from tiedquiet.verdict import BUFFER, LOUD, WELL, Finding, Verdict

SCHEMA = 1  # of the JSON; docs/check.md describes it
_ABSENT = "not in the checkpoint"


@dataclass(frozen=True)
class Result:
    """The result for one component.

    Attributes:
        component: its name in a pipeline; empty for the single model of a folder.
        cls: the name of its class.
        files: the files that it was loaded from.
        held: how many tensors hold the files' bytes, or what `maker` makes of them.
        total: how many tensors the checkpoint delivered.
        buffers: how many of the model's tensors are in no state dict.
        findings: one for each tensor that has something to report.
        missing: names of tensors that the files have nothing for.
        allowed: names of those not stored that the class says need no file.
        unexpected: names in the files that the model has no place for.
        problem: what is wrong with it as a whole.
        notes: what is worth knowing, but not wrong.
        error: why it cannot be checked.
        has_tensors: whether it is a model.
        counted: what is true of the tensors that count as held, if not that they hold the file's bytes.
        is_component: whether it is a part of what was named; a LoRA file beside it is none.
        maker: what made the tensors that are held and do not hold the file's own bytes; empty where all do.
    """

    component: str
    cls: str
    files: list[str] = field(default_factory=list)
    held: int = 0
    total: int = 0
    buffers: int = 0
    findings: list[Finding] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    allowed: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    problem: str = ""
    notes: list[str] = field(default_factory=list)
    error: str = ""
    has_tensors: bool = True
    counted: str = ""
    is_component: bool = True
    maker: str = ""

    @property
    def is_loud(self) -> bool:
        """Whether it has a problem."""
        return bool(self.missing or self.problem or self.error) or any(f.verdict not in WELL for f in self.findings)

    def as_json(self) -> dict[str, Any]:
        """Its part of the JSON."""
        return {
            "component": self.component or ".",
            "class": self.cls,
            "loud": self.is_loud,
            "error": self.error or None,
            "has_tensors": self.has_tensors,
            "files": self.files,
            "held": self.held,
            "tensors": self.total,
            "buffers": self.buffers,
            "findings": [_said(finding) for finding in self.findings],
            "missing": self.missing,
            "missing_allowed": self.allowed,
            "unexpected": self.unexpected,
            "problem": self.problem or None,
            "counted": self.counted or (f"tensors hold {self._bytes()}" if self.maker else None),
            "notes": self.notes,
        }

    def as_lines(self, every: bool = False) -> Iterator[str]:
        """The lines for a reader.

        Args:
            every: leave no row out.
        """
        start = printable(f"{self.component and self.component + ': '}{self.cls}: ")
        if self.error:
            yield start + coloured("cannot be checked", "red") + ": " + printable(self.error)
            return
        if not self.has_tensors:
            yield start + printable("; ".join(self.notes) or "has no tensors")
            return
        yield start + coloured(self._counted(), "red" if self.is_loud else "green")
        yield from (coloured(f"  {printable(line)}", "red") for line in filter(None, [self.problem]))
        yield from (f"  {printable(note)}" for note in self.notes)
        rows = [
            (f.key, f.verdict.value, f.source if f.source and f.source != f.key else "", _why(f)) for f in self.findings
        ]
        found = {finding.key for finding in self.findings}
        rows += [(key, "missing", "", _ABSENT) for key in self.missing if key not in found]
        rows += [(key, "unexpected", "", "in the checkpoint but not in the model") for key in self.unexpected]
        yield from table(rows, 1, every)

    def _bytes(self) -> str:
        return "the file's bytes" + (f", or what {self.maker} makes of them" if self.maker else "")

    def _counted(self) -> str:
        tensors = "tensor holds" if self.total == 1 else "tensors hold"
        said = [f"{self.held:,} of {self.total:,} " + (self.counted or f"{tensors} {self._bytes()}")]
        count = Counter(finding.verdict for finding in self.findings)
        unwritten = sum(1 for f in self.findings if f.verdict is Verdict.UNWRITTEN and f.why == BUFFER)
        said += [
            f"{count[verdict]:,} {verdict.value}" for verdict in (*WELL, *LOUD, Verdict.UNPROVEN) if count[verdict]
        ]
        said += [f"{len(self.missing):,} missing"] if self.missing else []
        said += [f"{len(self.allowed):,} not stored, which its class allows"] if self.allowed else []
        if self.buffers:
            written = f"{unwritten:,} never written" if unwritten else "written" if self.buffers == 1 else "all written"
            said.append(f"{self.buffers:,} buffer{'s' * (self.buffers > 1)}, {written}")
        return "; ".join(said)


def as_json(status: int, source: str, versions: dict[str, str | None], results: list[Result], error: str = "") -> str:
    """All of it for machines."""
    whole = {
        "schema": SCHEMA,
        "status": status,
        "error": error or None,
        "source": source,
        "versions": versions,
        "components": [result.as_json() for result in results],
    }
    return json.dumps(whole, indent=2).replace(
        "##[", r"\u0023#["
    )  # the same JSON, and no command to a workflow's runner


def of_file(path: Path, cls: str, reached: int, total: int, where: str, **more: Any) -> Result:
    """The result for a file that is loaded into a pipeline or a model, and is no component itself.

    Args:
        path: where it is.
        cls: the name of the class that loads it.
        reached: how many of its tensors arrive.
        total: how many it has.
        where: the components that they reach, in words.
        more: what else there is to say.
    """
    counted = f"tensors of the file reach {where}"
    return Result(path.name, cls, [str(path)], reached, total, counted=counted, is_component=False, **more)


def as_lines(results: list[Result], is_pipeline: bool, every: bool = False, quiet: bool = False) -> Iterator[str]:
    """All of it for a reader.

    Args:
        results: one for each component.
        is_pipeline: end with a line that sums up.
        every: leave no row out.
        quiet: leave out what is sound.
    """
    for result in results:
        if result.is_loud or not quiet:
            yield from result.as_lines(every)
    models = [result for result in results if result.is_component]
    loud = [result for result in models if result.is_loud]
    if is_pipeline and (loud or not quiet):
        read = [result for result in models if result.has_tensors and not result.error and not result.counted]
        held, total = sum(result.held for result in read), sum(result.total for result in read)
        well = f"{len(models) - len(loud)} of {len(models)} components are sound"
        hold = "hold the files' bytes" + ", or what is made of them" * any(result.maker for result in read)
        yield coloured(well, "red" if loud else "green") + f"; {held:,} of {total:,} tensors {hold}"


def _why(finding: Finding) -> str:
    if finding.verdict is Verdict.MISSING:
        return finding.why or _ABSENT
    return f"{finding.why}: uninitialised memory" if finding.verdict is Verdict.UNWRITTEN else finding.why


def _said(finding: Finding) -> dict[str, Any]:
    """A finding in the JSON: of what was loaded for this alone, nothing has changed since."""
    return {name: value for name, value in asdict(finding).items() if name != "since"}
