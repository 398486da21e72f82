"""The benchmarks of the example's students start, refuse bad input in one line, and write what they measured."""

import json
from pathlib import Path

import pytest

from tests.test_benchmarks import run


@pytest.mark.slow
def test_a_clip_of_each_on_the_cpu(tmp_path: Path) -> None:
    small = ["--shape", "tiny", "--device", "cpu", "--rounds", "1", "--timed_steps", "2", "--out", str(tmp_path)]
    done = run("distill_clip", *small)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.json")
    results = json.loads(path.read_text())["results"]
    assert results["times_as_fast_half_the_blocks"]["median"] > 5  # 100 passes of 4 blocks beside 2 passes of 2
    assert 1 < results["times_as_fast_with_decoding_all_blocks"] < results["times_as_fast_all_blocks"]["median"]
    assert path.with_suffix(".png").exists()


@pytest.mark.slow
def test_a_path_as_it_was_and_compiled(tmp_path: Path) -> None:
    small = ["--shape", "tiny", "--device", "cpu", "--rounds", "1", "--timed_steps", "2", "--out", str(tmp_path)]
    done = run("distill_clip", *small, "--paths")
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("distill-paths-tiny_*.json")
    results = json.loads(path.read_text())["results"]
    assert list(results) == ["plain", "compiled"]
    assert results["plain"]["times_as_fast"] == 1
    assert results["compiled"]["times_as_fast"] > 0
    assert results["compiled"]["difference_to_plain"] < 0.05
