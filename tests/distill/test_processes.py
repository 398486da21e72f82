"""Under `accelerate launch`: two processes, DDP and FSDP."""

import json
import os
import shutil
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers import WanPipeline

from tests.distill.running import IN_TWO_PROCESSES, SHORT, VELOCITY, experts, run, weights
from tiedquiet.distill import options, pipeline
from tiedquiet.distill.options import TINY_WAN
from tiedquiet.distill.pipeline import Teacher
from tiedquiet.distill.train import main


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--expert=high", "--fsdp_version 2"),
        ("--lora_rank=4", "the base is frozen, and whole on every GPU"),
    ],
)
def test_fsdp_refuses_what_it_cannot_do(
    argument: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    with pytest.raises(SystemExit):
        main([argument, "--output_dir", str(tmp_path / "out")])
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_under_fsdp_it_learns_as_under_ddp(tmp_path: Path, prompts: list[str]) -> None:
    """With the teacher's velocity, so that the teacher is spread over the processes as well."""
    common = [
        *SHORT,
        *prompts,
        *VELOCITY,
        "--student_blocks",
        "6",
        "--mixed_precision",
        "bf16",
        "--expert",
        "high",
        "--checkpointing_steps",
        "2",
    ]
    common += ["--gradient_checkpointing", "attention"]
    common += ["--validation_steps", "3", "--validation_prompts", "a red circle moving left", "--output_dir"]
    sharded = run(*common, tmp_path / "fsdp", launch=IN_TWO_PROCESSES, module="tests.distill.fsdp_on_cpu")
    assert sharded.returncode == 0, sharded.stderr
    assert json.loads((tmp_path / "fsdp/metrics.json").read_text())["distributed"] == "FSDP"
    whole = run(*common, tmp_path / "ddp", launch=IN_TWO_PROCESSES)
    assert whole.returncode == 0, whole.stderr
    one, two = weights(tmp_path / "fsdp"), weights(tmp_path / "ddp")
    teacher = Teacher(str(TINY_WAN)).expert(experts()[0], torch.float32)
    begun = pipeline.new_student(teacher, 6, torch.float32).state_dict()
    moved = torch.stack([(two[name] - begun[name]).norm() for name in two]).norm()
    assert torch.stack([(one[name] - two[name]).norm() for name in two]).norm() < 0.03 * moved


@pytest.mark.slow
def test_under_fsdp_the_average_is_kept_shown_and_gone_on_with(tmp_path: Path, prompts: list[str]) -> None:
    """A run of two steps that grows to three has the average, and the films, of one of three under DDP."""
    common = [*SHORT[:-4], *prompts, "--distribution_matching_steps", "0", "--student_dtype", "float32"]
    common += ["--lr_scheduler", "constant", "--lr_warmup_steps", "0"]
    common += ["--use_ema", "--ema_decay", "0.5", "--checkpointing_steps", "1", "--validation_steps", "1"]
    common += ["--validation_prompts", "a red circle moving left", "--output_dir"]
    sharded, plain = tmp_path / "fsdp", tmp_path / "ddp"
    for steps, more in (("2", []), ("3", ["--resume_from_checkpoint", "latest"])):
        shutil.rmtree(sharded / "student", ignore_errors=True)
        done = run(
            *common, sharded, "--max_train_steps", steps, *more, launch=IN_TWO_PROCESSES,
            module="tests.distill.fsdp_on_cpu",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    done = run(*common, plain, "--max_train_steps", "3", launch=IN_TWO_PROCESSES)
    assert done.returncode == 0, done.stderr
    films = [sorted(path.name for path in (out / "validation").iterdir()) for out in (sharded, plain)]
    assert films[0] == films[1]
    assert len(films[0]) == 2 * 3
    for expert in experts():
        one, two = (weights(out, expert.name) for out in (sharded, plain))
        begun = Teacher(str(TINY_WAN)).expert(expert, torch.float32).state_dict()
        moved = torch.stack([(two[name] - begun[name]).norm() for name in two]).norm()
        assert torch.stack([(one[name] - two[name]).norm() for name in two]).norm() < 0.01 * moved
    # Only this film was drawn by the same two experts: before, the longer run had no student of the other one.
    last = (out / "validation" / "transformer_2-segments-3.gif" for out in (sharded, plain))
    frames = [np.stack(imageio.mimread(film)).astype(float) for film in last]
    assert np.abs(frames[0] - frames[1]).mean() < 1


@pytest.mark.slow
def test_two_processes_under_accelerate(tmp_path: Path, prompts: list[str]) -> None:
    done = run(
        *SHORT, *prompts, "--output_dir", tmp_path / "out", "--cache_dir", tmp_path / "out/cache",
        "--expert", "high", "--checkpointing_steps", "2",
        "--validation_steps", "1", "--validation_prompts", "a red circle moving left", launch=IN_TWO_PROCESSES,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| teacher, 4 steps") == done.stdout.count("***** Training transformer, segments:") == 1
    assert len(list((tmp_path / "out/validation").iterdir())) == 3 + 2
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["processes"] == 2
    assert len(list((tmp_path / "out/cache").glob("paths-*/*.safetensors"))) == 4
    WanPipeline.from_pretrained(tmp_path / "out/student")


def test_another_process_waits_for_the_first_to_say_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    silence: list[str] = []
    monkeypatch.setattr(options.time, "sleep", lambda seconds: silence.append(capsys.readouterr().err))
    with pytest.raises(SystemExit):
        options.fail("only this one knows")
    assert silence == [""]
    assert capsys.readouterr().err == "tiedquiet.distill: only this one knows\n"


def test_one_process_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(["--export", str(tmp_path), "--output_dir", str(tmp_path / "out")]) == 0


def test_two_processes_may_write_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, own = tmp_path / "cache.json", os.getpid()
    with options.beside(place) as one:
        one.write_text("one")
        monkeypatch.setattr(os, "getpid", lambda: own + 1)
        with options.beside(place) as two:
            two.write_text("two")
        assert place.read_text() == "two"
    assert place.read_text() == "one"

    def torn() -> None:
        with options.beside(place) as part:
            part.write_text("half")
            raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        torn()
    assert [path.name for path in tmp_path.iterdir()] == ["cache.json"]
    assert place.read_text() == "one"


@pytest.mark.slow
def test_under_fsdp_the_second_stage_learns_as_under_ddp(tmp_path: Path, prompts: list[str]) -> None:
    common = [*SHORT, *prompts, "--checkpointing_steps", "2", "--output_dir"]
    sharded = run(*common, tmp_path / "fsdp", launch=IN_TWO_PROCESSES, module="tests.distill.fsdp_on_cpu")
    assert sharded.returncode == 0, sharded.stderr
    whole = run(*common, tmp_path / "ddp", launch=IN_TWO_PROCESSES)
    assert whole.returncode == 0, whole.stderr
    for expert in experts():
        one, two = weights(tmp_path / "fsdp", expert.name), weights(tmp_path / "ddp", expert.name)
        begun = Teacher(str(TINY_WAN)).expert(expert, torch.float32).state_dict()
        moved = torch.stack([(two[name] - begun[name]).norm() for name in two]).norm()
        assert torch.stack([(one[name] - two[name]).norm() for name in two]).norm() < 0.03 * moved
