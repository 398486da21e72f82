"""Real classes under damaged files (benchmarks/damage): seeds that have to stay clean, and that it sees what is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import damage
from benchmarks.damage.changes import CONTENTS, LAYOUTS, NAMES
from benchmarks.damage.judging import READERS, judged
from tiedquiet.doors import from_pretrained
from tiedquiet.proof import judge, leftovers, unread

SEEDS: dict[str, str] = json.loads((Path(damage.__file__).parent / "seeds.json").read_text())
# What building odd configurations warns of is not what is tested
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_quiet_thread")]


@pytest.mark.slow
def test_seeds_that_are_clean_stay_so_and_are_of_every_kind() -> None:
    lines = [judged(int(seed), name) for seed, name in SEEDS.items()]
    assert [line for line in lines if line["faults"] or line["skipped"]] == []
    kinds = {kind for line in lines for kind in line["kinds"]}
    assert kinds == {*CONTENTS, *NAMES, *LAYOUTS, *(f"by {reader}" for reader in READERS)}


def faults_of(seed: int, name: str) -> set[str]:
    return {fault for fault, *_ in judged(seed, name)["faults"]}


def test_it_sees_a_shim_that_says_nothing_of_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "judge_missing", lambda *_: ())
    assert faults_of(10, "BertForMaskedLM") == {"missed", "repaired wrongly"}


def test_it_sees_a_repair_that_reads_a_second_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unread, "doubts_of", lambda *_: {})
    assert faults_of(14, "BartForCausalLM") == {"repaired wrongly"}


def test_it_sees_a_shim_that_knows_no_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leftovers.Leftovers, "made", lambda *_: None)
    assert faults_of(178, "BertForMaskedLM") == {"passed by strict"}


def test_it_sees_a_shim_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(from_pretrained, "_note", lambda *_: 1 / 0)
    assert "fell aside" in faults_of(0, "BertForMaskedLM")


@pytest.mark.slow
def test_the_command_shows_a_seed_and_refuses_nonsense_in_one_line(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "benchmarks.damage", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(damage.__file__).parents[2])

    shown = run("--only", "0")
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["faults"] == []
    refused = run("--loads", "0")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    done = run("--loads", "2", "--jobs", "1", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (result,) = tmp_path.glob("damage-*.json")
    assert json.loads(result.read_text())["results"]["errors"] == []
    assert "What went wrong" in result.with_suffix(".md").read_text()
