"""One truth table for every release of transformers: verdicts and rows against the bytes of the file."""

import json
from pathlib import Path

import pytest

from tests.checkpoints import assert_agrees_with_the_bytes, printing
from tests.compat.cases import CASES
from tiedquiet import enable


@pytest.mark.parametrize("name", CASES)
def test_every_verdict_and_every_row_agrees_with_the_bytes(
    name: str, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    cls, stored = CASES[name](tmp_path)
    with enable("on"), printing() as printed:
        model, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    reported = set(info["missing_keys"])
    ties = assert_agrees_with_the_bytes(model, stored, reported, printed)
    dropped = {key for key in reported if not printed.shows(key)}
    assert bool(printed.confirmed) == bool(dropped)
    assert len(printed.confirmed) <= 1
    loud = {str(tie.verdict) for tie in ties if str(tie.verdict) in ("untied", "overwritten", "ambiguous")}
    assert len(printed.loud) >= len(loud)
    assert all(any(line.split(": ")[1].startswith(verdict) for line in printed.loud) for verdict in loud)
    if reported == dropped:
        assert not printed.report
    if table := pytestconfig.getoption("--table"):
        with Path(table).open("a") as file:
            verdicts = sorted({str(tie.verdict) for tie in ties})
            row = {"case": name, "verdicts": verdicts, "reported": len(reported), "dropped": len(dropped)}
            file.write(json.dumps(row) + "\n")
