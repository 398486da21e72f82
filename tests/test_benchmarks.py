"""The benchmarks start, refuse bad input in one line before any work, and find what they measure to be right."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.distill_step import SHAPES, Steps, gradient_error
from benchmarks.silencers import tables

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow
SCRIPTS = (
    "gpu_load",
    "report_scale",
    "startup",
    "silencers",
    "census",
    "distill_step",
    "distill_clip",
    "distill_matching",
    "distill_students",
    "distill_whole",
)


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = ROOT / "benchmarks" / script
    command = [sys.executable, *(["-m", f"benchmarks.{script}"] if path.is_dir() else [f"{path}.py"]), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_says_what_it_measures(script: str) -> None:
    done = run(script, "--help")
    assert done.returncode == 0, done.stderr
    assert f"python benchmarks/{script}.py" in done.stdout or f"python -m benchmarks.{script}" in done.stdout


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        ("gpu_load", ["--size", "huge"], "no size 'huge'; there are tiny, small, xxl"),
        ("gpu_load", ["--rounds", "0"], "at least one warm round"),
        ("report_scale", ["--max-keys", "0"], "--max-keys, --max-ties and --rounds are at least 1"),
        ("startup", ["--rounds", "1"], "at least two rounds"),
        ("silencers", ["4.57.6"], "no environment for transformers 4.57.6"),
        ("census", ["5.24.0", "4.57.6"], "no environment for transformers 4.57.6"),
        ("census", ["--only", "("], "is no regular expression"),
        ("distill_step", ["--shape", "huge"], "no shape 'huge'; there are wan2.1-1.3b"),
        ("distill_step", ["--arms", "fast"], "no arm 'fast'; there are plain"),
        ("distill_step", ["--rounds", "0"], "at least one round"),
        ("distill_clip", ["--shape", "huge"], "no shape 'huge'; there are wan2.1-1.3b"),
        ("distill_matching", ["--shape", "huge"], "no shape 'huge'; there are wan2.1-1.3b"),
        ("distill_matching", ["--rounds", "0"], "at least one round"),
        ("distill_clip", ["--timed_steps", "51"], "at least one round, and 1 to 50 timed steps"),
        ("distill_step", ["--student-blocks", "31"], "--student-blocks 31: the teacher has 30"),
        ("distill_students", ["--seeds", "0"], "at least one seed"),
        ("distill_whole", ["--num_inference_steps", "5"], "a multiple of four teacher steps"),
    ],
)
def test_bad_input_gets_one_clear_line(script: str, arguments: list[str], words: str, tmp_path: Path) -> None:
    done = run(script, *arguments, "--out", str(tmp_path))
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_load_with_and_without_on_the_cpu(tmp_path: Path) -> None:
    small = ["--size", "tiny", "--device", "cpu", "--rounds", "2", "--cold-rounds", "1"]
    done = run("gpu_load", *small, "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "out").glob("*.json")
    content = json.loads(path.read_text())
    assert set(content) >= {"date", "hardware", "versions", "configuration", "results"}
    assert len(content["results"]["rounds"]) == 3
    assert path.with_suffix(".png").exists()


def test_what_silences_the_report_and_what_notices_corruption() -> None:
    done = run("silencers", "--here")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    rows = tables.rows({"here": found})
    scores: dict[str, dict[str, dict[str, str]]] = {"report": {}, "corruption": {}}
    for table, ways in scores.items():
        for row in rows[table]:
            ways.setdefault(row["way"], {})[row["situation"]] = row["here"]
    report, corruption = scores["report"], scores["corruption"]
    for mode in ("tiedquiet", "tiedquiet, `repair`", "tiedquiet, `strict`"):
        # peft warns of the adapter before `repair` reads it.
        late = {"adapter matches nothing"} if "repair" in mode else set()
        assert {name for name, score in report[mode].items() if score != "right"} == late
        # Written without torch: what a watch cannot see is said where it is measured, too.
        assert {name for name, score in corruption[mode].items() if score == "missed"} == {"written through an address"}
    no_row = {"overwritten outside ties", "padding row zeroed", "unwritten buffer", "alias"}
    no_row |= {"codes without scale", "one name in two shards"}
    for way, row in report.items():
        if not way.startswith("tiedquiet"):
            assert {name for name, score in row.items() if score == "hidden"} >= no_row
    untouched, silent = report["reading the report"], report["`set_verbosity_error()`"]
    assert {name for name, score in untouched.items() if score == "hidden"} == no_row
    assert untouched["disk offload"] == untouched["resume, tied"] == "false row"
    told = {"resume, converted class", "best model, converted class", "unmapped prefix", "subclass without renaming"}
    assert {name for name in told if untouched[name] == "right" and silent[name] == "hidden"} == told
    differs = {
        name for name, score in report['`warnings.filterwarnings("ignore")`'].items() if score != untouched[name]
    }
    assert differs == {"adapter matches nothing"}
    assert silent["untied, declared by nobody"] == "hidden"
    by_info = report["`set_verbosity_error()`, reading `output_loading_info`"]
    assert by_info["untied, declared by nobody"] == "right"
    assert by_info["false row by override"] == "false row"
    assert report["`set_verbosity_error()`, then `model.tie_weights()`"]["untied, declared by nobody"] != "right"
    corrupt = {name for name, score in corruption["hashing the file"].items() if score == "missed"}
    assert corrupt >= {"a weight beside a buffer", "a weight beside a missing bias", "Qwen 1: both"}
    assert "a row for padding, zeroed by a user's class" in corrupt
    assert not any(name.startswith("sound") for name in corrupt)
    assert {name for name, score in corruption["reading the report"].items() if score == "missed"} < corrupt
    assert corruption["comparing logits by hand"]["written through an address"] == "noticed"
    repaired = {name for name, score in corruption["tiedquiet, `repair`"].items() if score == "quiet"}
    assert repaired >= corrupt - {"alias", "written through an address"}
    assert {name for name, score in corruption["`python -m tiedquiet check`"].items() if score == "noticed"} == corrupt


def test_a_result_is_drawn_anew_from_its_rows(tmp_path: Path) -> None:
    (path,) = (ROOT / "benchmarks" / "results").glob("silencers_*.json")
    copy = tmp_path / path.name
    copy.write_bytes(path.read_bytes())
    done = run("silencers", "--draw", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert copy.with_suffix(".md").read_text() == path.with_suffix(".md").read_text()
    assert len(list(tmp_path.glob("*.png"))) == 2
    assert run("silencers", "--draw", "--out", str(tmp_path / "none")).returncode == 2


def test_a_distillation_step_on_the_cpu(tmp_path: Path) -> None:
    small = ["--shape", "tiny", "--device", "cpu", "--rounds", "1", "--out", str(tmp_path)]
    done = run("distill_step", *small, "--arms", "plain", "checkpointing", "segments: checkpointing")
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
    done = run("distill_matching", *small)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.json")
    arms = json.loads(path.read_text())["results"]["arms"]
    # By hand, as for a step above: 16 blocks forward, and 16 forward and backward; of a frozen weight nothing is learnt.
    linear = 2 * 32 * (6 * 128 * 128 + 2 * 128 * 64) + 2 * 8 * 2 * 128 * 128
    block = (linear + 4 * 32 * 32 * 128 + 4 * 32 * 8 * 128) / 1e12
    assert arms["whole"]["useful_teraflop"] == pytest.approx((16 + 3 * 16) * block)
    assert arms["lora"]["useful_teraflop"] == pytest.approx((16 + 2 * 16) * block)
    assert all(arm["seconds"]["min"] > 0 < arm["planned_seconds"] for arm in arms.values())


def test_the_whole_example_on_a_pipeline_of_another_size(tmp_path: Path) -> None:
    small = ["--shape", "tiny", "--device", "cpu", "--max_train_steps", "2", "--num_inference_steps", "4"]
    done = run("distill_whole", *small, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.json")
    results = json.loads(path.read_text())["results"]
    assert list(results["phases"]) == [
        "start, prompts, paths",
        "training",
        "writing the student",
        "samples and pictures",
    ]
    assert "student/model_index.json" in results["files"]
    assert path.with_suffix(".png").exists()


@pytest.mark.slow
def test_the_control_of_two_students(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle moving left\n")
    small = ["--prompts_file", str(tmp_path / "prompts.txt"), "--max_train_steps", "1", "--samples_per_prompt", "1"]
    small += ["--distribution_matching_steps", "2", "--seeds", "1", "--out", str(tmp_path / "out")]
    students = ["2 steps", "2 steps, DMD2 alone", "velocity"]
    done = run("distill_students", *small, "--students", *students)
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
    done = run("distill_step", "--scaling", "--kinds", "one", "ddp", *small)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.json")
    runs = json.loads(path.read_text())["results"]["runs"]
    assert [(run["arm"], run["kind"], run["processes"]) for run in runs] == [
        (arm, kind, count) for arm in small[-2:] for kind, count in (("one", 1), ("ddp", 2))
    ]
    assert [run["ratio_to_one"] for run in runs[::2]] == [1, 1]
    assert runs[1]["ratio_to_one"] == runs[1]["tokens_per_s"] / runs[0]["tokens_per_s"]
    assert all(run["tokens_per_s"] > 0 for run in runs)
