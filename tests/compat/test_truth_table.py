"""One truth table for every release of transformers: verdicts and rows against the bytes of the file."""

import json
from pathlib import Path

import pytest

from tests.checkpoints import assert_agrees_with_the_bytes, printing
from tests.compat.cases import CASES
from tests.idioms import dirty_memory
from tiedquiet import enable
from tiedquiet.verdict import LOUD


@pytest.mark.parametrize("name", CASES)
def test_every_verdict_and_every_row_agrees_with_the_bytes(
    name: str, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    cls, stored = CASES[name](tmp_path)
    with enable("on"), dirty_memory(), printing() as printed:
        model, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    reported = set(info["missing_keys"])
    proof = assert_agrees_with_the_bytes(model, stored, reported, printed)
    found = {finding.verdict for finding in proof.findings}
    dropped = {key for key in reported if not printed.shows(key)}
    assert bool(printed.confirmed) == bool(dropped)
    assert len(printed.confirmed) <= 1
    loud = {verdict.value for verdict in found & set(LOUD)}
    assert len(printed.loud) >= len(loud)
    assert all(any(line.split(": ")[1].startswith(verdict) for line in printed.loud) for verdict in loud)
    if reported == dropped:
        assert not printed.report
    if table := pytestconfig.getoption("--table"):
        with Path(table).open("a") as file:
            row = {"case": name, "verdicts": sorted(found), "reported": len(reported), "dropped": len(dropped)}
            file.write(json.dumps(row) + "\n")
