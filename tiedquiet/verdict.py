"""What can be true of a tensor after loading, and the public types that say so. No torch."""

import re
from collections import Counter
from dataclasses import dataclass
from enum import Enum


class Verdict(str, Enum):
    """What happened to one name in a model's state dict."""

    TIED = "tied"
    COPIED = "copied"
    UNREAD = "unread"
    UNTIED = "untied"
    OVERWRITTEN = "overwritten"
    UNWRITTEN = "unwritten"
    AMBIGUOUS = "ambiguous"
    MISSING = "missing"
    UNPROVEN = "unproven"

    __str__ = str.__str__


WELL = (Verdict.TIED, Verdict.COPIED)
# Why something is unwritten.
BUFFER = "a buffer"
LOOSE = "a tensor on meta, which its module does not register"
KEPT_OUT = "a parameter on meta, which its class keeps out of its state dict"
ONE_OF_TWO = "Find out which one the model was trained with, and store only that one"
IN_FILES = (Verdict.UNREAD, Verdict.MISSING)  # the source of these is a name that the files have
LOUD = (Verdict.UNREAD, Verdict.UNTIED, Verdict.OVERWRITTEN, Verdict.UNWRITTEN, Verdict.AMBIGUOUS)


@dataclass(frozen=True)
class Finding:
    """The verdict on one name.

    Attributes:
        key: the tensor's name in the model's state dict; empty if the finding is about the whole load.
        verdict: what was found.
        source: the stored key that `key` follows, should follow, or lost to; for `unread` and `missing`, the
            name that the files have for it, or may have (the first, if it is made of several). None if there is none.
        why: the cause, in words; empty if there is nothing to add.
        broken: whether `strict` stops for it. False for a head that nobody asked to tie.
        cure: what to do about this cause, as a sentence without its full stop; empty if the verdict says it all.
        since: whether it was not so when the load had ended.
    """

    key: str
    verdict: Verdict
    source: str | None = None
    why: str = ""
    broken: bool = False
    cure: str = ""
    since: bool = False


@dataclass(frozen=True)
class Proof:
    """What is known about a loaded model.

    Attributes:
        model: the name of its class.
        stored: how many tensors of its state dict were read from the checkpoint and still held its values when the
            load ended.
        findings: one for each name for which that is not so, sorted by key.
        total: how many tensors its state dict had when it was loaded.
    """

    model: str
    stored: int
    findings: tuple[Finding, ...]
    total: int = 0

    @property
    def ok(self) -> bool:
        """Whether every tensor came from the checkpoint and every tie holds. False if nothing is known.

        A tensor that its class says needs no file (`_keys_to_ignore_on_load_missing`) is not required.
        """
        return all(finding.verdict in WELL for finding in self.findings)

    @property
    def missing(self) -> int:
        """How many tensors the checkpoint has nothing for."""
        return sum(finding.verdict is Verdict.MISSING for finding in self.findings)

    @property
    def unread(self) -> int:
        """How many tensors the checkpoint has under another name or in another form, but nothing read."""
        return sum(finding.verdict is Verdict.UNREAD for finding in self.findings)

    def __str__(self) -> str:
        count = Counter(finding.verdict for finding in self.findings)
        came = self.stored + sum(count[verdict] for verdict in WELL)
        said = [f"{came} of {self.total} tensor{'s' * (self.total != 1)} came from the checkpoint"]
        said += [f"{count[verdict]} {verdict}" for verdict in Verdict if verdict not in WELL and count[verdict]]
        bad = [finding.verdict for finding in self.findings if finding.verdict not in WELL and not finding.since]
        sound = "sound" if not bad else "not proven to be sound" if set(bad) == {Verdict.UNPROVEN} else "not sound"
        said.append(f"the load was {sound}")
        if changes := sum(finding.since for finding in self.findings):
            said[-1] += f", with {changes} change{'s' * (changes != 1)} since"
        if not self.total and not self.ok:  # of what code of somebody else's read, no more is known than what it left
            left = [f"{n} {verdict}" for verdict, n in count.items() if verdict is not Verdict.UNPROVEN]
            said = [*left, f"nothing {'else ' if left else ''}is known about its load"]
        lines = [f"{self.model}: {'; '.join(said)}"]
        for finding in self.findings:
            parts = [finding.verdict.value, finding.key, f"({finding.source})" if finding.source else "", finding.why]
            lines.append("  " + escaped(" ".join(filter(None, parts))))
        return "\n".join(lines)


class LoadError(RuntimeError):
    """The model does not hold what the checkpoint stored, and the mode is `strict`.

    Attributes:
        findings: what is broken.
    """

    def __init__(self, message: str, findings: tuple[Finding, ...] = ()) -> None:
        super().__init__(escaped(message))
        self.findings = findings


# What Python calls printable and nobody sees. A runner of GitHub compares without them: `##` and `[` with one between
# are `##[` to it.
_UNSEEN = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")


def escaped(text: str) -> str:
    """Strangers' text as one line that is shown as it is: it may be in a log that something reads for commands.

    Args:
        text: any; a runner of GitHub obeys a line that begins with `::`, after blanks, or has `##[` anywhere.
    """
    seen = "".join(
        c if c.isprintable() and not _UNSEEN.match(c) else c.encode("unicode_escape").decode("ascii") for c in text
    )
    return re.sub(r"^( *):(?=:)", r"\1\\x3a", seen).replace("##[", r"\x23#[")
