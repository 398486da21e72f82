"""`--plan`, and the space and memory that are asked for beforehand."""

import re
import shutil
from pathlib import Path

import pytest

from tests.distill.running import VELOCITY
from tiedquiet.distill import options, plan, train
from tiedquiet.distill.options import TINY_WAN, parse
from tiedquiet.distill.pipeline import Teacher
from tiedquiet.distill.train import __doc__ as DOC
from tiedquiet.distill.train import main


def test_the_space_for_checkpoints_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []
    monkeypatch.setattr(options.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 0))
    for kept, stage in ((1_000, VELOCITY), (3_000, VELOCITY), (3_000, [])):
        argv = ["--checkpointing_steps", "1", "--checkpoints_total_limit", str(kept), "--expert", "low"]
        with pytest.raises(SystemExit):
            main([*argv, *stage, "--student_blocks", "6", "--output_dir", str(tmp_path / "out")])
        asked.append(float(re.findall(r"about ([\d.]+) GB", capsys.readouterr().err)[0]))
    # Each has the weights and Adam's two moments in float32; and those of the critic.
    one = 3 * 4 * 794_848 / 1e9
    assert asked[1] - asked[0] == pytest.approx(2_000 * one, abs=0.15)
    assert asked[2] - asked[1] == pytest.approx(2 * 3_000 * one, abs=0.3)
    assert parse(DOC, []).checkpoints_total_limit == 2


def test_a_run_that_continues_needs_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(options.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 0))
    argv = ["--expert", "low", "--checkpointing_steps", "1", "--output_dir", str(tmp_path / "out")]
    place = tmp_path / "out/checkpoints/transformer_2/segments/checkpoint-1"

    def asked(*more: str) -> float:
        with pytest.raises(SystemExit):
            main([*argv, *more])
        return float(re.findall(r"about ([\d.]+) GB", capsys.readouterr().err)[0])

    before = asked()
    monkeypatch.setattr(train, "resume_from", lambda args, names: {})
    place.mkdir(parents=True)
    with (place / "model.safetensors").open("wb") as file:
        file.truncate(100_000_000)
    assert asked("--resume_from_checkpoint", "latest") == pytest.approx(before - 0.1, abs=0.06)


@pytest.mark.filterwarnings("default")  # layer norm is not fused on CPUs in bf16
@pytest.mark.parametrize("flags", [[], ["--expert", "high", "--mixed_precision", "bf16", "--compile"], VELOCITY])
def test_a_plan_is_all_that_is_made(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*flags, "--plan"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert ("steps of the student, by their timesteps: transformer takes 999" in lines[0]) == (flags != VELOCITY)
    (made,) = (line for line in lines if " to make, " in line)
    assert made.startswith(f"{'latents' if flags == VELOCITY else 'paths'} of 24 steps: 1,920 to make, 0 to reuse; ")
    (disk,) = (line for line in lines if line.startswith("disk: "))
    total, out, cache = (float(number) for number in re.findall(r"\d+\.\d+", disk))
    assert total == pytest.approx(out + cache, abs=0.011)
    assert min(out, cache) > 0
    assert any(line.startswith("matching: 300 steps of 32 for each expert, ") for line in lines) == (flags != VELOCITY)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("RANK", "1")  # the first process says it, and measures alone
    assert main([*flags, "--plan"]) == 0
    assert capsys.readouterr().out == ""


def test_a_plan_counts_what_an_update_passes() -> None:
    """Two experts of six blocks at four steps: the low-noise one's states cost 2.5 passes of the student on average."""
    args = parse(DOC, ["--student_steps", "4"])
    args.student_blocks = 6
    assert plan.step_blocks(args, "segments", 6, [0, 1]) == (0, 6)
    assert plan.step_blocks(args, "matching", 6, [2, 3]) == (2.5 * 6 + 3 * 6, 2 * 6 + 2 * 6)
    args.segment_weight, args.expert = 0, "low"
    assert plan.step_blocks(args, "matching", 6, [2, 3]) == (0.5 * 6 + 3 * 6, 6 + 2 * 6)
    args.guidance_scale = 3
    assert plan.step_blocks(args, "velocity", 6, [0]) == (2 * 6, 6)
    millions = plan.parameters(Teacher(str(TINY_WAN)).transformer)
    assert millions == 794_848
    args = parse(DOC, [*VELOCITY, "--mixed_precision", "bf16", "--use_ema"])
    args.student_blocks = 6
    assert plan.memory(args, Teacher(str(TINY_WAN)).transformer) == (16 + 4 + 2) * millions


@pytest.mark.parametrize(
    ("flags", "experts", "processes", "bytes_each"),
    [
        # Student and critic, 12 bytes each and the gradients of one; the teacher in bfloat16.
        ([], 1, 1, 12 + 12 + 4 + 2),
        ([], 1, 2, 12 + 12 + 8 + 2),  # DDP keeps the gradients of both
        ([], 2, 1, 12 + 12 + 4 + 2 + 2),  # the first expert's student is there as well
        (["--distribution_matching_steps", "0"], 2, 1, 16),  # paths say all that the teacher would
    ],
)
def test_a_plan_counts_what_is_held(flags: list[str], experts: int, processes: int, bytes_each: int) -> None:
    args, config = parse(DOC, ["--mixed_precision", "bf16", *flags]), Teacher(str(TINY_WAN)).transformer
    args.student_blocks = config["num_layers"]
    assert plan.memory(args, config, experts, processes) == bytes_each * plan.parameters(config)


@pytest.mark.slow
def test_the_cache_is_counted_before_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Paths of two steps in float32, 16 x 2 x 8 x 8 numbers each, on one disk with all else."""
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 10**9))
    with pytest.raises(SystemExit):
        main(["--samples_per_prompt", "40000", "--plan", "--output_dir", str(tmp_path / "out")])
    err = capsys.readouterr().err
    assert "--cache_dir" in err
    assert float(err.split("about ")[1].split(" GB")[0]) == pytest.approx(48 * 40_000 * 2 * 2048 * 4 / 1e9, abs=0.2)


def test_hours_are_told_as_people_say_them() -> None:
    told = [plan.told_hours(hours) for hours in (2.25, 0.5, 0.02, 0.001)]
    assert told == ["2.2 hours", "30 minutes", "1 minute", "under a minute"]
