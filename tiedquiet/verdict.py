"""What can be true of a tensor after loading, and how it is handed over. No torch."""

from dataclasses import dataclass
from enum import Enum


class Verdict(str, Enum):
    """What became of one name of a model's state dict."""

    TIED = "tied"
    COPIED = "copied"
    UNTIED = "untied"
    OVERWRITTEN = "overwritten"
    UNWRITTEN = "unwritten"
    AMBIGUOUS = "ambiguous"
    ABSENT = "absent"
    UNPROVEN = "unproven"

    __str__ = str.__str__


WELL = (Verdict.TIED, Verdict.COPIED)
BUFFER = "a buffer"  # why something is unwritten
LOUD = (Verdict.UNTIED, Verdict.OVERWRITTEN, Verdict.UNWRITTEN, Verdict.AMBIGUOUS)


@dataclass(frozen=True)
class Finding:
    """The verdict on one name.

    Attributes:
        key: the tensor's name in the model's state dict; empty where the finding is about the whole load.
        verdict: what was found.
        source: the stored key that `key` follows, should follow, or lost to; None where there is none.
        why: the cause, in words; empty where there is nothing to add.
        broken: whether `strict` stops for it. False for a head that nobody asked to tie.
    """

    key: str
    verdict: Verdict
    source: str | None = None
    why: str = ""
    broken: bool = False


@dataclass(frozen=True)
class Proof:
    """What is known of a loaded model.

    Attributes:
        model: the name of its class.
        stored: how many tensors were delivered by the checkpoint and are proven to have reached the model unchanged.
        findings: one for each name that is not simply stored and unchanged, sorted by key.
    """

    model: str
    stored: int
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether all that the checkpoint stored is held, and every tie holds. False where nothing is known."""
        return all(finding.verdict in WELL for finding in self.findings)

    def __str__(self) -> str:
        count = "1 stored tensor is" if self.stored == 1 else f"{self.stored} stored tensors are"
        lines = [f"{self.model}: {count} held unchanged; {'all is well' if self.ok else 'not all is well'}"]
        for finding in self.findings:
            parts = [finding.verdict.value, finding.key, f"({finding.source})" if finding.source else "", finding.why]
            lines.append("  " + " ".join(filter(None, parts)))
        return "\n".join(lines)


class LoadError(RuntimeError):
    """The model does not hold what the checkpoint stored, and the mode is `strict`.

    Attributes:
        findings: what is broken.
    """

    def __init__(self, message: str, findings: tuple[Finding, ...] = ()) -> None:
        super().__init__(message)
        self.findings = findings
