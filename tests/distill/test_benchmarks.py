"""The benchmarks of the example measure what they say, on a tiny shape: steps, clips, paths, the whole, the students."""

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks.distill.shapes import SHAPES
from benchmarks.distill.steps import Steps, gradient_error
from benchmarks.distill.students import flags, pictured, theme
from tests.test_benchmarks import run

pytestmark = pytest.mark.slow


def test_a_distillation_step_on_the_cpu(tmp_path: Path) -> None:
    small = ["--shape", "tiny", "--device", "cpu", "--rounds", "1", "--out", str(tmp_path)]
    done = run("distill.step", *small, "--arms", "plain", "checkpointing", "segments: checkpointing")
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.json")
    results = json.loads(path.read_text())["results"]
    assert set(results["arms"]) == {"plain", "checkpointing", "segments: checkpointing"}
    assert path.with_suffix(".png").exists()
    # By hand: 32 tokens, dim 128, 8 words, feed-forward 64; 4 blocks of the teacher and 3 times 2 of the student.
    linear = 2 * 32 * (6 * 128 * 128 + 2 * 128 * 64) + 2 * 8 * 2 * 128 * 128
    flops = 10 * (linear + 4 * 32 * 32 * 128 + 4 * 32 * 8 * 128)
    assert results["arms"]["plain"]["useful_teraflop"] == pytest.approx(flops / 1e12)
    segments = results["arms"]["segments: checkpointing"]
    assert segments["useful_teraflop"] == pytest.approx(0.6 * flops / 1e12)
    assert "teacher_error" not in segments
    # Taken before the first step; after some of them it is 0.5, because there is nothing but rounding left to learn.
    assert all(arm["gradient_error"]["error"] < 0.1 for arm in results["arms"].values())
    moved = results["weights_moved_by_one_step"]
    assert moved["float32"] > 0.99
    assert moved["bfloat16"] < 0.5


def test_an_update_of_the_second_stage_on_the_cpu(tmp_path: Path) -> None:
    small = ["--shape", "tiny", "--device", "cpu", "--rounds", "1", "--out", str(tmp_path)]
    done = run("distill.matching", *small)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.json")
    arms = json.loads(path.read_text())["results"]["arms"]
    # By hand, as for a step above: 16 blocks forward, and 16 forward and backward; of a frozen weight nothing is learnt.
    linear = 2 * 32 * (6 * 128 * 128 + 2 * 128 * 64) + 2 * 8 * 2 * 128 * 128
    block = (linear + 4 * 32 * 32 * 128 + 4 * 32 * 8 * 128) / 1e12
    assert arms["whole"]["useful_teraflop"] == pytest.approx((16 + 3 * 16) * block)
    assert arms["lora"]["useful_teraflop"] == pytest.approx((16 + 2 * 16) * block)
    assert all(arm["seconds"]["min"] > 0 < arm["planned_seconds"] for arm in arms.values())


def test_an_update_of_the_second_stage_in_two_processes(tmp_path: Path) -> None:
    small = ["--shape", "tiny", "--device", "cpu", "--rounds", "1", "--out", str(tmp_path)]
    done = run("distill.matching", "--scaling", *small, "--kinds", "ddp")
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("distill-matching-scaling-tiny_*.json")
    runs = json.loads(path.read_text())["results"]["runs"]
    assert [(run["arm"], run["kind"], run["processes"]) for run in runs] == [("whole", "ddp", 2), ("lora", "ddp", 2)]
    assert all(run["tokens_per_s"] > 0 < run["communication"] for run in runs)


def test_the_whole_example_on_a_pipeline_of_another_size(tmp_path: Path) -> None:
    """Under an adapter and compiled, as the page has it: no block is compiled so often that torch gives it up."""
    small = ["--shape", "tiny", "--device", "cpu", "--max_train_steps", "2", "--num_inference_steps", "4"]
    small += ["--distribution_matching_steps", "2", "--lora_rank", "4"]
    done = run("distill.whole", *small, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.json")
    results = json.loads(path.read_text())["results"]
    assert list(results["phases"]) == [
        "start, prompts, paths",
        "training, segments",
        "training, matching",
        "writing the student",
        "samples and pictures",
    ]
    assert "recompile_limit" not in done.stderr
    assert list(results["took"]) == list(results["planned"]["seconds"]) == ["paths", "segments", "matching"]
    assert set(results["took"]["matching"]) == {"seconds", "warm"}
    assert results["disk_gb"] > 0
    assert "student/pytorch_lora_weights.safetensors" in results["files"]
    assert path.with_suffix(".png").exists()


def test_one_student_alone_is_no_control() -> None:
    assert theme(["2 steps", "velocity"]) == "distill-students"
    assert theme(["1 step, at length"]) == "distill-students-1-step-at-length"


def test_a_short_trial_is_short_whatever_the_student() -> None:
    passed = {"max_train_steps": "2", "distribution_matching_steps": "1", "samples_per_prompt": "1"}
    shortened = ["--max_train_steps", "2", "--samples_per_prompt", "1"]
    assert flags("1 step, at length", passed)[-4:] == shortened
    assert flags("velocity", passed)[-4:] == shortened
    assert flags("2 steps, DMD2 alone", passed)[-4:] == ["--distribution_matching_steps", "1", *shortened[2:]]


def test_the_control_of_two_students(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle moving left\n")
    small = ["--prompts_file", str(tmp_path / "prompts.txt"), "--max_train_steps", "1", "--samples_per_prompt", "1"]
    small += ["--distribution_matching_steps", "2", "--seeds", "1", "--out", str(tmp_path / "out")]
    students = ["2 steps", "2 steps, DMD2 alone", "velocity"]
    done = run("distill.students", *small, "--students", *students)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "out").glob("*.json")
    results = json.loads(path.read_text())["results"]
    passed = {arm: measured["block_passes"]["median"] for arm, measured in results["arms"].items()}
    assert passed["teacher, 24 steps"] == 2 * passed["velocity: student, 24 steps"] == 288
    assert passed["2 steps: segments, 2 steps"] == passed["2 steps: student, 2 steps"] == 12
    assert "2 steps, DMD2 alone: student, 2 steps" in passed
    # Six blocks of two experts, 32 samples, forward and twice as dear backward; the teacher is guided, so asked twice. In
    # the second stage the low-noise expert's states cost the other's pass; then two steps of the critic.
    cost = {name: spent["block_passes"]["training"] for name, spent in results["training"].items()}
    matching = 2 * 32 * (3 + 18 + 12 + 6 + 2 * 18)
    assert cost == {
        "2 steps": 2 * 32 * 18 + 2 * (matching + 2 * 32 * 18),
        "2 steps, DMD2 alone": 2 * matching,
        "velocity": 2 * 32 * (18 + 12),
    }
    made = {name: spent["block_passes"]["data"] for name, spent in results["training"].items()}
    assert made == {"2 steps": 288, "2 steps, DMD2 alone": 0, "velocity": 288}
    for student in ("2-steps", "2-steps-DMD2-alone", "velocity"):
        assert path.with_name(f"{path.stem}_{student}.png").read_bytes().startswith(b"\x89PNG")
    alone = path.with_name(f"{theme(['1 step'])}_card_2026-01-01.json")
    assert pictured(alone, "1 step", ["1 step"]).name == "distill-students-1-step_card_2026-01-01.png"


def test_the_rates_of_adapters(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle moving left\n")
    small = ["--prompts_file", str(tmp_path / "prompts.txt"), "--max_train_steps", "1", "--samples_per_prompt", "1"]
    small += ["--distribution_matching_steps", "1", "--ranks", "4", "--times", "3", "--out", str(tmp_path / "out")]
    done = run("distill.rates", *small, "--apart")
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "out").glob("*.json")
    runs = json.loads(path.read_text())["results"]["runs"]
    assert [(one["rank"], one["times"], one["name"]) for one in runs] == [(0, [1, 1, 1], "1"), (4, [3, 3, 3], "3")]
    assert all("segments, 2 steps" in one["arms"] for one in runs)
    assert path.with_suffix(".png").exists()


def test_one_wrong_gradient_is_not_lost_among_many() -> None:
    gradients = {
        f"blocks.{n}.{name}": torch.full((3,), 10.0**n) for n in range(4) for name in ("table", "ffn.0.weight")
    }
    assert gradient_error(gradients, gradients)["error"] == 0
    off = {**gradients, "blocks.3.table": torch.full((3,), 2000.0)}
    told = gradient_error(off, gradients)
    assert told == {"of": "blocks.table", "error": pytest.approx(1, rel=0.01)}
    for wrong in (math.nan, math.inf):
        told = gradient_error({**off, "blocks.0.ffn.0.weight": torch.full((3,), wrong)}, gradients)
        assert told["of"] == "blocks.ffn.weight"
        assert not math.isfinite(told["error"])


@pytest.mark.parametrize("wrong", ["weight", "gradient"])
def test_a_step_that_computes_nothing_is_not_timed(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    steps = Steps(SHAPES["tiny"], "cpu")
    parameter = next(steps.student.parameters())
    if wrong == "weight":
        parameter.data.fill_(math.nan)
    else:  # finite itself, unlike its norm: clipped by that, it would be 0, and the loss would stay as it is
        parameter.register_hook(lambda gradient: torch.full_like(gradient, 1e38))
    with pytest.raises(SystemExit) as stopped:
        steps(steps.inputs())
    assert stopped.value.code == 2
    assert "the time of such a step says nothing" in capsys.readouterr().err


def test_a_distillation_step_in_two_processes(tmp_path: Path) -> None:
    small = ["--shape", "tiny", "--device", "cpu", "--rounds", "1", "--out", str(tmp_path)]
    small += ["--arms", "plain", "segments: checkpointing"]
    done = run("distill.step", "--scaling", "--kinds", "one", "ddp", *small)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.json")
    runs = json.loads(path.read_text())["results"]["runs"]
    assert [(run["arm"], run["kind"], run["processes"]) for run in runs] == [
        (arm, kind, count) for arm in small[-2:] for kind, count in (("one", 1), ("ddp", 2))
    ]
    assert [run["ratio_to_one"] for run in runs[::2]] == [1, 1]
    assert runs[1]["ratio_to_one"] == runs[1]["tokens_per_s"] / runs[0]["tokens_per_s"]
    assert all(run["tokens_per_s"] > 0 for run in runs)


def test_a_clip_of_each_on_the_cpu(tmp_path: Path) -> None:
    small = ["--shape", "tiny", "--device", "cpu", "--rounds", "1", "--timed_steps", "2", "--out", str(tmp_path)]
    done = run("distill.clip", *small)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.json")
    results = json.loads(path.read_text())["results"]
    assert results["times_as_fast_half_the_blocks"]["median"] > 5  # 100 passes of 4 blocks beside 2 passes of 2
    assert 1 < results["times_as_fast_with_decoding_all_blocks"] < results["times_as_fast_all_blocks"]["median"]
    assert path.with_suffix(".png").exists()


def test_a_path_as_it_was_and_compiled(tmp_path: Path) -> None:
    small = ["--shape", "tiny", "--device", "cpu", "--rounds", "1", "--timed_steps", "2", "--out", str(tmp_path)]
    done = run("distill.clip", *small, "--paths")
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("distill-paths-tiny_*.json")
    results = json.loads(path.read_text())["results"]
    assert list(results) == ["plain", "compiled"]
    assert results["plain"]["times_as_fast"] == 1
    assert results["compiled"]["times_as_fast"] > 0
    assert results["compiled"]["difference_to_plain"] < 0.05
