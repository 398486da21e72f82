"""The fuzzer (benchmarks/fuzz): seeds that have to stay clean, that it sees what is wrong, and that it is repeatable."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import fuzz
from benchmarks.fuzz import draw, judging, mutations, report
from benchmarks.fuzz.running import lines_of
from benchmarks.fuzz.writes import WAYS

SEEDS: dict[str, Any] = json.loads((Path(fuzz.__file__).parent / "seeds.json").read_text())
# What accelerate and drawn classes warn of is not what is tested
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_quiet_thread")]


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS["clean"])
def test_seeds_that_are_clean_stay_so(seed: int, tmp_path: Path) -> None:
    assert judging.judged(seed, str(tmp_path)).faults == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", SEEDS["failing"])
def test_what_is_known_to_be_wrong_is_taken_off_the_list_once_it_is_right(kind: str, tmp_path: Path) -> None:
    """Seeds that fail today. One that passes belongs among the clean ones, where it cannot fail again unseen."""
    passing = [seed for seed in SEEDS["failing"][kind] if not judging.judged(seed, str(tmp_path)).faults]
    assert passing == []


def test_a_seed_draws_the_same_plan_and_the_same_verdicts(tmp_path: Path) -> None:
    assert draw.plan(7) == draw.plan(7)
    first, second = (judging.as_line(judging.judged(7, str(tmp_path))) for _ in range(2))
    assert first == second


@pytest.mark.slow
def test_every_kind_is_drawn() -> None:
    kinds = set().union(*(draw.plan(seed).kinds for seed in range(1000)))
    assert {f"write: {way}" for way in WAYS} <= kinds
    assert {f"moment: {moment}" for moment in draw.MOMENTS} <= kinds
    assert {f"tie_weights: {override}" for override in draw.OVERRIDES} <= kinds
    assert {"one key in two shards", "two tensors in one storage", "state_dict=", "device_map: disk"} <= kinds


@pytest.mark.slow
def test_a_rule_that_is_taken_away_is_found() -> None:
    name, seeds = "no memory counts as unwritten", list(range(60))
    with_it, without = (report.by_seed(lines_of((seeds, rule))) for rule in ("", name))
    assert any(without[seed] - with_it[seed] for seed in seeds)


@pytest.mark.parametrize("rule", mutations.TABLE)
def test_every_seam_of_the_table_is_there(rule: str) -> None:
    with mutations.removed(rule):
        pass


def test_a_seam_that_is_gone_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = mutations.Seam("tiedquiet.proof.judge", "no_such_rule", lambda original: original)
    monkeypatch.setitem(mutations.TABLE, "gone", (gone,))
    with pytest.raises(LookupError, match="has no no_such_rule"), mutations.removed("gone"):
        pass


@pytest.mark.slow
def test_the_command_shows_a_seed_and_refuses_nonsense_in_one_line(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "benchmarks.fuzz", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(fuzz.__file__).parents[2])

    shown = run("--only", str(SEEDS["clean"][0]))
    assert shown.returncode == 0, shown.stderr
    assert "true: " in shown.stdout
    refused = run("--loads", "0")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    done = run("--loads", "4", "--jobs", "2", "--out", str(tmp_path))
    assert done.returncode in (0, 1), done.stderr
    (result,) = tmp_path.glob("fuzz-*.json")
    assert json.loads(result.read_text())["results"]["errors"] == []
    assert "What went wrong" in result.with_suffix(".md").read_text()
