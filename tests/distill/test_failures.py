"""Interrupts, full disks, divergence, a folder that is taken: one line each, and what was saved is kept."""

import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors import SafetensorError
from safetensors.torch import load_file

from tests.distill.running import ENVIRONMENT, SHORT, interrupt
from tiedquiet.distill import evaluate, options, train
from tiedquiet.distill.checkpoint import alone_in, checkpoints, noticing_signals, save_checkpoint
from tiedquiet.distill.train import main
from tiedquiet.distill.train import run as run_main


@pytest.mark.slow
def test_a_run_that_diverges_stops_before_it_saves_that(
    tmp_path: Path, prompts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*SHORT, *prompts, "--learning_rate", "1e38", "--lr_warmup_steps", "0", "--checkpointing_steps", "1"]
    with pytest.raises(SystemExit) as stopped:
        main([*argv, "--output_dir", str(tmp_path / "out")])
    assert stopped.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "transformer, segments, step 2: the loss or its gradient is not finite" in last
    assert [path.name for path in checkpoints(tmp_path / "out/checkpoints/transformer/segments")] == ["checkpoint-1"]


@pytest.mark.slow
def test_ctrl_c_while_caching_keeps_the_cache(tmp_path: Path, prompts: list[str]) -> None:
    many = [*SHORT, *prompts, "--samples_per_prompt", "10000", "--cache_dir", str(tmp_path / "out/cache")]
    status, lines = interrupt(signal.SIGINT, "cache/paths-*/*.safetensors", tmp_path / "out", *many)
    assert status == 128 + signal.SIGINT
    assert lines[-1] == "tiedquiet.distill: interrupted; what was cached is kept"
    assert not any("Traceback" in line for line in lines)
    for kept in tmp_path.glob("out/cache/*/*.safetensors"):
        load_file(kept)


def test_no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(options.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1_000_000))
    with pytest.raises(SystemExit):
        main(["--output_dir", str(tmp_path / "out")])
    assert "GB, 0.0 GB are free" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "moment", "words"),
    [
        (20_000, "a path", "the disk: File too large; what was saved before is kept"),
        (5_000_000, "a checkpoint", "the disk: a checkpoint could not be written; what was saved before is kept"),
    ],
)
def test_a_full_disk_gets_one_line(limit: int, moment: str, words: str, tmp_path: Path, prompts: list[str]) -> None:
    """No file may grow beyond the limit, which is to its writer what a full disk is."""
    command = [sys.executable, "-m", "tiedquiet.distill", *SHORT, *prompts, "--samples_per_prompt", "1"]
    command += ["--cache_dir", str(tmp_path / "cache")]
    command += ["--expert", "low", "--checkpointing_steps", "1", "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        # Measuring coverage, it would also fail to write that.
        env={name: value for name, value in ENVIRONMENT.items() if not name.startswith("COVERAGE")},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 2, (moment, done.stderr)
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == f"tiedquiet.distill: {words}"
    assert not list(tmp_path.rglob(".part-*"))  # a disk that is full of it would stay so


@pytest.mark.slow
def test_a_critic_that_diverges_is_not_saved(
    tmp_path: Path, prompts: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also if its loss was finite and only its gradient was not: clipping makes all its weights NaN."""
    clipped, asked = train.clipped, list[Any]()

    def infinite(accelerator: Any, model: Any, limit: float) -> torch.Tensor:
        asked.append(model)
        if len(asked) == 2:  # the student's comes first
            for parameter in model.parameters():
                parameter.grad.fill_(float("inf"))
        return clipped(accelerator, model, limit)

    monkeypatch.setattr(train, "clipped", infinite)
    argv = [*SHORT, *prompts, "--max_train_steps", "0", "--expert", "high", "--checkpointing_steps", "1"]
    with pytest.raises(SystemExit):
        main([*argv, "--critic_steps", "1", "--output_dir", str(tmp_path / "out")])
    assert "transformer, matching, step 1: the loss or its gradient is not finite" in capsys.readouterr().err
    assert checkpoints(tmp_path / "out/checkpoints/transformer/matching") == []


@pytest.mark.slow
def test_a_signal_after_the_last_step_is_not_lost(
    tmp_path: Path, prompts: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """While its checkpoint or the student is written, which takes a large one minutes."""
    monkeypatch.setattr(evaluate.Judge, "report", lambda self, experts: {})
    argv = [*SHORT, *prompts, "--expert", "low", "--max_train_steps", "1", "--output_dir", str(tmp_path / "out")]
    save, told = train.save_weights, list[Path]()

    def told_to_stop(config: Any, state: Any, place: Path) -> None:
        if not told:
            told.append(place)
            os.kill(os.getpid(), signal.SIGTERM)
        save(config, state, place)

    monkeypatch.setattr(train, "save_weights", told_to_stop)
    assert main(argv) == 128 + signal.SIGTERM
    work = tmp_path / "out/checkpoints/transformer_2"
    assert f"stopped by SIGTERM; saved {work / 'segments/student'}; continue with" in capsys.readouterr().err
    assert not (work / "matching").exists()
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main([*argv, "--resume_from_checkpoint", "latest"]) == 0


def test_a_signal_is_noticed_once(capfd: pytest.CaptureFixture[str]) -> None:
    with noticing_signals() as received:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
    assert received == [signal.SIGTERM] * 2
    assert capfd.readouterr().err == "\ntiedquiet.distill: ends after this step, whose checkpoint is saved\n"


def test_half_a_checkpoint_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = Accelerator(cpu=True)

    def full(folder: str) -> None:
        Path(folder).mkdir()
        (Path(folder) / "model.safetensors").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(accelerator, "save_state", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(accelerator, tmp_path / "checkpoint-1", None)
    assert list(tmp_path.iterdir()) == []


def test_what_is_written_does_not_depend_on_the_locale(tmp_path: Path) -> None:
    """A model card has Wan's negative prompt in it, which is Chinese."""
    code = "import sys; from pathlib import Path; from tiedquiet.distill import options as o; "
    code += "o.write_text(Path(sys.argv[1]), o.NEGATIVE)"
    ascii_alone = {**ENVIRONMENT, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    command = [sys.executable, "-c", code, str(tmp_path / "card")]
    subprocess.run(command, env=ascii_alone, check=True, cwd=Path(__file__).parents[2])
    assert (tmp_path / "card").read_text(encoding="utf-8") == options.NEGATIVE


def test_an_interrupt_outside_training_says_what_stays(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "main", interrupted)
    assert train.run() == 130
    assert capsys.readouterr().err == "tiedquiet.distill: interrupted; what was cached is kept\n"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device", "x/args.json"), "x/args.json: No space left on device"),
        (OSError(30, "Read-only file system"), "the disk: Read-only file system"),
        (shutil.Error([("a", "b", "[Errno 28] No space left on device")]), "No space left on device')]"),
        (
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            "the disk: No space left on device; what was saved before is kept",
        ),
        (
            RuntimeError("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file data/3"),
            "the disk: a checkpoint could not be written; what was saved before is kept",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ..."),
            "tiedquiet.distill: CUDA out of memory. Tried to allocate 2.00 GiB; what was saved before is kept; --plan "
            "says what training takes, --lora_rank, --gradient_checkpointing and a smaller --train_batch_size take less",
        ),
    ],
)
def test_whatever_the_world_lacks_is_told_in_one_line(
    error: Exception, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> int:
        raise error

    monkeypatch.setattr("tiedquiet.distill.train.main", fails)
    with pytest.raises(SystemExit) as stopped:
        run_main()
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tiedquiet.distill: ")
    assert line.endswith(words)


def test_an_error_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> int:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr("tiedquiet.distill.train.main", fails)
    with pytest.raises(RuntimeError, match="shapes differ"):
        run_main()


@pytest.mark.slow
def test_what_ends_the_drawing_of_samples_says_what_is_there(
    tmp_path: Path, prompts: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    def out_of_memory(*args: Any) -> None:
        raise torch.OutOfMemoryError

    argv = [*SHORT, *prompts, "--expert", "low", "--output_dir", str(tmp_path / "out")]
    with monkeypatch.context() as patched:
        patched.setattr(train, "write_pipeline", interrupted)
        assert main(argv) == 130
    assert "interrupted; training is complete; --resume_from_checkpoint latest finishes" in capsys.readouterr().err
    with monkeypatch.context() as patched:
        patched.setattr(evaluate.Judge, "report", interrupted)
        assert main([*argv, "--resume_from_checkpoint", "latest"]) == 130
    assert "interrupted; the student is complete" in capsys.readouterr().err
    with monkeypatch.context() as patched:
        patched.setattr(evaluate.Judge, "report", out_of_memory)
        assert main([*argv, "--resume_from_checkpoint", "latest"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "tiedquiet.distill: the GPU's memory does not suffice to draw samples; the student is complete; "
        "--resume_from_checkpoint latest finishes"
    )
    written = (tmp_path / "out/student/model_index.json").stat().st_mtime_ns
    assert main([*argv, "--resume_from_checkpoint", "latest"]) == 0
    assert (tmp_path / "out/student/model_index.json").stat().st_mtime_ns == written
    assert (tmp_path / "out/student/README.md").exists()
    assert not (tmp_path / "out/checkpoints").exists()


HOLDS = """
import sys
from pathlib import Path
from tiedquiet.distill.checkpoint import alone_in
with alone_in(Path(sys.argv[1])):
    print("in", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_is_kept_out_of_the_folder_and_a_crash_leaves_no_lock(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, pipe = tmp_path / "out", subprocess.PIPE
    command = [sys.executable, "-c", HOLDS, str(out)]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=ENVIRONMENT) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "in\n"
        with pytest.raises(SystemExit) as ended:
            main(["--output_dir", str(out)])
        assert ended.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{out}: another run is using it (process {first.pid} on " in line
        assert [path.name for path in out.iterdir()] == [".lock"]
        assert main(["--output_dir", str(out), "--plan"]) == 0  # writes nothing
        with monkeypatch.context() as patched:
            patched.setenv("RANK", "1")  # the first process holds it for all
            with alone_in(out):
                pass
        first.kill()
    with alone_in(out):
        assert f"process {os.getpid()} on " in (out / ".lock").read_text()
    # A file system without locks: it is said, and the run goes on.
    monkeypatch.setattr("fcntl.flock", lambda *args: (_ for _ in ()).throw(OSError(38, "Function not implemented")))
    with alone_in(out):
        assert "cannot be locked (Function not implemented)" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["diffusers", "tqdm"])
def test_a_missing_extra_is_named(package: str, tmp_path: Path) -> None:
    (tmp_path / f"{package}.py").write_text(
        f"raise ModuleNotFoundError('No module named {package}', name='{package}')\n"
    )
    command = [sys.executable, "-m", "tiedquiet.distill"]
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).parents[2]}"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        f"tiedquiet.distill: no module {package}; in a checkout of tiedquiet, "
        "python -m pip install '.[distill]' installs what the example needs\n"
    )
    (tmp_path / f"{package}.py").write_text("raise KeyboardInterrupt\n")  # importing all takes seconds
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (130, "tiedquiet.distill: interrupted; nothing was begun\n")
