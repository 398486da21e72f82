"""Every idiom of this folder in every mode: what is said against the bytes, and what is mended."""

from pathlib import Path
from typing import Any

import pytest
import torch

import tiedquiet
from tests.checkpoints import Printed, printing
from tests.gate.test_compare import compared
from tests.idioms import (
    CONFIRMED,
    IDIOMS,
    LOUD,
    Culprits,
    Idiom,
    Tiny,
    Truth,
    assert_agrees,
    dirty_memory,
    everything,
    outputs_agree,
    same,
    truth,
)
from tiedquiet import LoadError, Proof

SEEN = [name for name, idiom in IDIOMS.items() if not idiom.blind]


@pytest.fixture(autouse=True)
def _dirty() -> Any:
    with dirty_memory():
        yield


class Off:
    """The load as transformers does it, and what is true of it."""

    def __init__(self, idiom: Idiom, folder: Path) -> None:
        self.idiom = idiom
        self.file = idiom.save(folder)
        with tiedquiet.enable("off"), printing() as printed, Culprits(idiom, self.file) as culprits:
            self.model, missing = idiom.load(folder)
        self.rows = {key for key in missing if printed.shows(key)}
        self.culprits = culprits.of
        self.truth = self.true_of(self.model)

    def true_of(self, model: Tiny) -> Truth:
        return truth(model, self.file, self.idiom.build(), self.idiom.architectures)


def assert_equal(model: Tiny, other: Tiny) -> None:
    theirs = everything(other)
    assert {key for key, value in everything(model).items() if not same(value.detach(), theirs[key].detach())} == set()


def _names(line: str, key: str) -> bool:
    """Whether a line names a key, or has named as many as one reads."""
    return key in line or " more" in line


def assert_said(printed: Printed, proof: Proof, off: Off) -> None:
    """The lines name what was found, each kind once, and the code that did it."""
    findings = [finding for finding in proof.findings if finding.verdict in LOUD]
    for finding in findings:
        assert any(finding.verdict.value in line and _names(line, finding.key) for line in printed.loud), finding
    assert len(printed.loud) >= len({finding.verdict for finding in findings})
    assert len(printed.loud) <= len({(finding.verdict, finding.why) for finding in findings})
    text = "\n".join(printed.loud)
    for key in off.truth.lost - off.truth.rivals:
        if lines := off.culprits[key]:
            assert any(name in text and line in text for name, line in lines), (key, lines, text)


@pytest.mark.slow
@pytest.mark.parametrize("name", SEEN)
def test_the_truth_is_right(name: str, tmp_path: Path) -> None:
    """Where nothing is lost, the outputs are those of a model that was built and filled without any loading."""
    off = Off(IDIOMS[name], tmp_path)
    found = off.truth
    if found.rivals or any(value.is_meta for value in everything(off.model).values()):
        return
    other = {key for key in off.truth.asked if off.truth.ties[key]} - found.shared.keys() - found.equal.keys()
    right = not (found.lost or found.unwritten or found.wrong or other - found.constant)
    assert outputs_agree(off.idiom, off.model, off.file) == right


@pytest.mark.parametrize("name", SEEN)
def test_on_says_what_is_true_and_changes_nothing(name: str, tmp_path: Path) -> None:
    off = Off(IDIOMS[name], tmp_path)
    with tiedquiet.enable("on"), printing() as printed:
        model, missing = off.idiom.load(tmp_path)
    assert_equal(model, off.model)
    proof = tiedquiet.check(model)
    assert_agrees(proof, model, off.true_of(model), off.file)
    confirmed = {finding.key for finding in proof.findings if finding.verdict in CONFIRMED}
    rows = {key for key in missing if printed.shows(key)}
    assert rows == off.rows - confirmed
    assert bool(printed.confirmed) == bool(off.rows & confirmed)
    for key in off.rows & confirmed:
        assert any(key in line for line in printed.confirmed)
    for key in (off.rows - confirmed) | off.truth.lost:
        assert not any(key in line for line in printed.confirmed)
    assert_said(printed, proof, off)


@pytest.mark.slow
@pytest.mark.parametrize("name", SEEN)
def test_what_lay_in_memory_before_does_not_matter(name: str, tmp_path: Path) -> None:
    IDIOMS[name].save(tmp_path)
    with tiedquiet.enable("on"):
        dirty = tiedquiet.check(IDIOMS[name].load(tmp_path)[0])
        torch.use_deterministic_algorithms(False)
        clean = tiedquiet.check(IDIOMS[name].load(tmp_path)[0])
    assert dirty == clean


@pytest.mark.slow
@pytest.mark.parametrize("name", SEEN)
def test_strict_stops_exactly_where_something_is_broken(name: str, tmp_path: Path) -> None:
    off = Off(IDIOMS[name], tmp_path)
    broken = off.truth.broken(off.file)
    with tiedquiet.enable("strict"), printing() as printed:
        error = None
        try:
            model, _ = off.idiom.load(tmp_path)
        except LoadError as raised:
            error = raised
    if error is None:
        assert not broken
        assert_equal(model, off.model)
        return
    assert broken is not False, error
    allowed = off.truth.verdicts(off.file)
    assert error.findings
    for finding in error.findings:
        assert finding.verdict in LOUD & allowed[finding.key]
        assert _names(str(error), finding.key)
    assert not printed.loud, "what it prints stands once"


@pytest.mark.parametrize("name", SEEN)
def test_repair_makes_it_right(name: str, tmp_path: Path) -> None:
    off = Off(IDIOMS[name], tmp_path)
    with tiedquiet.enable("repair"), printing() as printed:
        model, missing = off.idiom.load(tmp_path)
    now, found = everything(model), off.true_of(model)
    # A file that contradicts itself cannot be satisfied, and a parameter's first values are nobody's to invent.
    stays = {key for key in off.truth.unwritten if key in dict(model.named_parameters(remove_duplicate=False))}
    stays -= found.ties.keys()
    changed = {key for key, value in off.file.items() if not same(now[key].detach(), value.to(now[key].dtype))}
    assert changed <= found.rivals
    assert not found.wrong
    assert found.unwritten <= stays | {key for key in found.ties if key not in off.truth.asked or not _fits(key, off)}
    for key in found.ties.keys() & off.truth.asked:
        if _fits(key, off) and found.ties[key]:
            assert key in found.shared, "what should be one tensor is one"
    proof = tiedquiet.check(model)
    assert_agrees(proof, model, found, off.file)
    mended = {finding.key for finding in proof.findings if finding.verdict in CONFIRMED}
    mended |= {key for key in off.truth.unwritten - found.unwritten if key in off.rows}
    rows = {key for key in missing if printed.shows(key)}
    assert rows == off.rows - mended
    then = everything(off.model)
    kept = {key for key in off.file if not same(then[key].detach(), now[key].detach())}
    did = kept or off.truth.unwritten - found.unwritten or off.rows & mended
    # A write that is not let through is told even if it would have changed nothing in the end: nobody can know then.
    assert bool(printed.confirmed) == bool(did) or name in ("TheSameValuesAgain", "WritesAndRestores")
    if not found.unwritten:
        assert outputs_agree(off.idiom, model, off.file)


def _fits(key: str, off: Off) -> bool:
    shapes = {off.file[end].shape for end in off.truth.ties.get(key, set())}
    return shapes == {off.model.state_dict()[key].shape}


@pytest.mark.parametrize("name", [name for name in IDIOMS if name not in SEEN])
def test_what_no_watch_sees_is_not_called_seen(name: str, tmp_path: Path) -> None:
    """Writes that do not go through torch are what `python -m tiedquiet check` is for."""
    off = Off(IDIOMS[name], tmp_path)
    with tiedquiet.enable("on"), printing() as printed:
        model, _ = off.idiom.load(tmp_path)
    assert off.true_of(model).lost
    assert not printed.confirmed


@pytest.mark.parametrize("name", IDIOMS)
def test_every_byte_against_the_file_agrees_and_is_not_blind(name: str, tmp_path: Path) -> None:
    idiom = IDIOMS[name]
    file = idiom.save(tmp_path)
    with tiedquiet.enable("on"), printing():
        model, _ = idiom.load(tmp_path)
    found = compared(model)
    proof = Proof(type(model).__name__, found.held, tuple(found.findings))
    assert_agrees(proof, model, truth(model, file, idiom.build(), idiom.architectures), file)
