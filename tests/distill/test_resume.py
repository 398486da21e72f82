"""A run that was stopped goes on, and one that is finished may grow."""

import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers.optimization import get_scheduler
from safetensors.torch import load_file

from tests.distill.running import SHORT, TWO, interrupt, run, same, weights
from tiedquiet.distill import evaluate, train
from tiedquiet.distill.checkpoint import Progress, checkpoints
from tiedquiet.distill.train import main


@pytest.fixture(scope="module")
def ran_through(tmp_path_factory: pytest.TempPathFactory, cache: str) -> tuple[list[str], Path]:
    """The settings of a run through both stages of both experts, and where it is."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "prompts.txt").write_text(TWO)
    common = [*SHORT, "--prompts_file", str(folder / "prompts.txt"), "--cache_dir", cache]
    common += ["--max_train_steps", "8", "--distribution_matching_steps", "6", "--use_ema"]
    done = run(*common, "--output_dir", folder / "out")
    assert done.returncode == 0, done.stderr
    return common, folder / "out"


@pytest.mark.slow
@pytest.mark.parametrize("where", ["transformer/segments", "transformer_2/matching"])
def test_a_run_that_was_stopped_and_resumed_equals_one_that_ran_through(
    where: str, ran_through: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common, whole = ran_through
    broken = tmp_path / "broken"

    often = [*common, "--checkpointing_steps", "1", "--checkpoints_total_limit", "2"]
    status, lines = interrupt(signal.SIGTERM, f"checkpoints/{where}/checkpoint-*", broken, *often)
    assert status == 128 + signal.SIGTERM
    saved = re.fullmatch(
        r"tiedquiet\.distill: stopped by SIGTERM; saved (\S+); continue with --resume_from_checkpoint latest", lines[-1]
    )
    assert saved, lines[-1]
    assert "tiedquiet.distill: ends after this step, whose checkpoint is saved" in lines
    assert Path(saved[1]).is_dir()
    assert not (broken / "student").exists()
    assert len(list((broken / "checkpoints/transformer/segments").glob("checkpoint-*"))) <= 2
    assert int(saved[1].split("-")[-1]) < (8 if where.endswith("segments") else 6)

    with pytest.raises(SystemExit):
        main([*common, "--output_dir", str(broken)])
    assert "an unfinished run" in capsys.readouterr().err
    # From the oldest one, so that steps which had been saved are taken once more.
    oldest = checkpoints(broken / "checkpoints" / where)[0]
    assert oldest.parent == Path(saved[1]).parent
    done = run(*common, "--output_dir", broken, "--checkpointing_steps", "1", "--resume_from_checkpoint", oldest)
    assert done.returncode == 0, done.stderr
    for expert in ("transformer", "transformer_2"):
        assert same(weights(whole, expert), weights(broken, expert))
    assert main([*common, "--output_dir", str(broken), "--resume_from_checkpoint", "latest"]) == 0
    assert capsys.readouterr().out.endswith("is finished\n")


@pytest.mark.slow
def test_a_run_may_grow(
    prompts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It ends with the weights of one that had as many steps from the beginning."""
    monkeypatch.setattr(evaluate.Judge, "report", lambda self, experts: {})
    constant = ["--lr_scheduler", "constant", "--segment_weight", "0", "--use_ema", "--output_dir"]
    common = [*SHORT, *prompts, "--expert", "low", *constant]
    few = [*common, str(tmp_path / "out"), "--max_train_steps", "2", "--distribution_matching_steps"]
    more = ["--resume_from_checkpoint", "latest", "--checkpointing_steps", "5"]

    def refused(*args: str) -> str:
        with pytest.raises(SystemExit):
            main([*args, *more])
        return capsys.readouterr().err

    assert main([*few, "1", "--checkpointing_steps", "5"]) == 0
    assert "that run had --max_train_steps 2, this one has 1; it may only grow" in refused(
        *few[:-2], "1", *few[-1:], "1"
    )
    assert "student is finished, with fewer steps; move it away" in refused(*few, "3")
    (tmp_path / "out/student").rename(tmp_path / "before")
    assert "the second stage builds on the first, and has begun" in refused(*few[:-2], "3", few[-1], "3")
    assert main([*few, "3", *more]) == 0
    assert main([*few, "3", *more]) == 0
    assert capsys.readouterr().out.endswith("is finished\n")

    assert (
        main(
            [
                *few[:-3],
                "--max_train_steps",
                "2",
                "--distribution_matching_steps",
                "3",
                "--output_dir",
                str(tmp_path / "whole"),
            ]
        )
        == 0
    )
    assert same(weights(tmp_path / "out", "transformer_2"), weights(tmp_path / "whole", "transformer_2"))
    assert not same(
        weights(tmp_path / "out", "transformer_2"), load_file(next(tmp_path.glob("before/transformer_2/*.safetensors")))
    )
    # Nor can a first stage be put before a second one.
    alone = [*common, str(tmp_path / "alone"), "--distribution_matching_steps", "1", "--checkpointing_steps", "1"]
    assert main([*alone, "--max_train_steps", "0"]) == 0
    shutil.rmtree(tmp_path / "alone/student")
    assert "the second stage builds on the first" in refused(*alone, "--max_train_steps", "2")
    # Of a run that kept none there is nothing to go on from.
    with pytest.raises(SystemExit):
        main(
            [
                *few[:-3],
                "--max_train_steps",
                "2",
                "--distribution_matching_steps",
                "4",
                "--output_dir",
                str(tmp_path / "whole"),
                *more,
            ]
        )
    assert "student is finished, and its checkpoints are gone" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "out/student")
    for left in checkpoints(tmp_path / "out/checkpoints/transformer_2/matching"):
        shutil.rmtree(left)
    assert "matching: has no checkpoint to continue from" in refused(*few, "4")


@pytest.mark.slow
def test_a_run_that_is_killed_as_it_has_grown_is_not_taken_for_finished(
    prompts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its losses are those of the new length, its student would be the old one; and what it wrote in part goes."""
    monkeypatch.setattr(evaluate.Judge, "report", lambda self, experts: {})
    common = [*SHORT, *prompts, "--expert", "low", "--distribution_matching_steps", "0", "--lr_scheduler", "constant"]
    out, few = tmp_path / "out", ["--max_train_steps", "2", "--checkpointing_steps", "1"]
    more = ["--max_train_steps", "3", "--resume_from_checkpoint", "latest", "--output_dir", str(out)]
    assert main([*common, *few, "--output_dir", str(out)]) == 0
    shutil.rmtree(out / "student")
    stage = out / "checkpoints/transformer_2/segments"
    for copy in ("checkpoint-1-mine", "checkpoint-good"):  # a user's own: neither latest nor ever deleted
        shutil.copytree(stage / "checkpoint-2", stage / copy)
    left = [out / ".part-student", stage / ".part-checkpoint-9", out / ".part-1-args.json"]
    for folder in left[:2]:
        (folder / "half").mkdir(parents=True)
    left[2].write_text("half")

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(train, "save_weights", killed)
        with pytest.raises(KeyboardInterrupt):
            main([*common, *few, *more])
    AcceleratorState._reset_state(reset_partial_state=True)
    assert not any(path.exists() for path in left)

    torn = stage / "checkpoint-3/optimizer.bin"
    whole = torn.read_bytes()
    torn.write_bytes(whole[:1000])
    with pytest.raises(SystemExit):
        main([*common, *few, *more])
    AcceleratorState._reset_state(reset_partial_state=True)
    assert f"{torn.parent}: cannot be read: PytorchStreamReader" in capsys.readouterr().err
    torn.with_name("model.safetensors").rename(tmp_path / "model")
    with pytest.raises(SystemExit):
        main(["--export", str(torn.parent), "--output_dir", str(tmp_path / "exported")])
    assert f"{torn.parent}: cannot be read: No such file" in capsys.readouterr().err
    (tmp_path / "model").rename(torn.with_name("model.safetensors"))
    torn.write_bytes(whole)

    file = tmp_path / "prompts.txt"
    file.write_text(TWO + "a third\n")
    with pytest.raises(SystemExit):
        main([*common, *few, *more])
    assert "that run had other prompts or clips" in capsys.readouterr().err
    file.write_text(TWO)
    assert main([*common, *few, *more]) == 0
    assert main([*common, "--max_train_steps", "3", "--output_dir", str(tmp_path / "whole")]) == 0
    assert same(weights(out, "transformer_2"), weights(tmp_path / "whole", "transformer_2"))
    kept = {path.name for path in stage.glob("checkpoint-*")}
    assert kept == {"checkpoint-2", "checkpoint-3", "checkpoint-1-mine", "checkpoint-good"}


def test_the_schedule_of_a_run_that_grew_is_that_of_its_new_length() -> None:
    def schedule(steps: int) -> Any:
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=1.0)
        return get_scheduler("cosine", optimizer, num_warmup_steps=1, num_training_steps=steps)

    old, new, whole = schedule(4), schedule(8), schedule(8)
    for it in (old, whole):
        for _ in range(3):
            it.optimizer.step()
            it.step()
    before, after = Progress(), Progress()
    before.begin(schedule=old)
    after.begin(schedule=new)
    new.optimizer.load_state_dict(old.optimizer.state_dict())
    after.load_state_dict(before.state_dict())
    assert old.optimizer.param_groups[0]["lr"] != new.optimizer.param_groups[0]["lr"]
    assert new.optimizer.param_groups[0]["lr"] == whole.optimizer.param_groups[0]["lr"]


def test_another_number_of_processes_does_not_resume(
    bad: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    argv = ["--output_dir", str(bad / "run"), "--resume_from_checkpoint", "latest", "--seed", "7"]
    with pytest.raises(SystemExit):
        main(argv)
    assert "that run had --processes 1, this one has 2" in capsys.readouterr().err
