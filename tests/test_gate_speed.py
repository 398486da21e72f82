"""The benchmark of the gate's speed runs, at a size that tells nothing of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "benchmarks.gate_speed", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_every_way_in_every_round(tmp_path: Path) -> None:
    small = ["--sizes", "tiny", "many", "--tensors", "48", "--rounds", "2", "--cold-rounds", "1"]
    done = run(*small, "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "out").glob("gate-speed_*.json")
    assert path.with_suffix(".png").exists()
    sizes = json.loads(path.read_text())["results"]["sizes"]
    assert {size: measured["tensors"] for size, measured in sizes.items()} == {"tiny": 22, "many": 52}
    ways = {"comparing", "loading", "sha256sum", "reading", "copying"}
    for size, measured in sizes.items():
        warm, cold = (
            [one["seconds"] for one in measured["rounds"] if one["cold"] is is_cold] for is_cold in (False, True)
        )
        assert (len(warm), len(cold)) == (2, size == "tiny")
        assert all(one.keys() >= ways - ({"loading"} if size == "many" else set()) for one in warm)
        assert all(one.keys() == {"comparing", "loading", "reading"} for one in cold)
        assert all(seconds > 0 for one in warm + cold for seconds in one.values())
    assert "1" in sizes["tiny"]["by_threads"]
    assert "| tiny, 0.00 GB, 22 tensors | comparing |" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sizes", "huge"], "no size 'huge'; there are tiny, small, xxl, many"),
        (["--rounds", "0"], "at least one warm round"),
    ],
)
def test_bad_input_gets_one_clear_line(arguments: list[str], words: str, tmp_path: Path) -> None:
    done = run(*arguments, "--out", str(tmp_path))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert words in done.stderr
    assert list(tmp_path.iterdir()) == []
