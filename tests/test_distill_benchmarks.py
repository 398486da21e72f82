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
    assert results["times_as_fast"]["median"] > 5  # 100 passes of 4 blocks beside 4 passes of 2
    assert results["training step, segments"]["median"] > 0
    assert path.with_suffix(".png").exists()


@pytest.mark.slow
def test_both_students_once(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle moving left\n")
    short = ["--seeds", "1", "--max_train_steps", "1", "--samples_per_prompt", "1"]
    short += ["--jobs", "2", "--students", "segments", "velocity"]
    done = run("distill_students", *short, "--prompts_file", str(tmp_path / "prompts.txt"), "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.json")
    results = json.loads(path.read_text())["results"]
    arms = results["arms"]
    assert {"segments: student, 4 steps", "velocity: student, 24 steps", "velocity: student, 4 steps"} <= set(arms)
    assert arms["velocity: student, 24 steps"]["block_passes"]["median"] == 144
    assert "| velocity: student, 4 steps |" in done.stdout
    # One clip of 24 guided steps through 6 blocks; two experts, a batch of 32, three passes of 6, two of the teacher's.
    passes = {name: spent["block_passes"] for name, spent in results["training"].items()}
    assert passes == {
        "segments": {"data": 288, "training": 64 * 18},
        "velocity": {"data": 288, "training": 64 * 30},
    }
