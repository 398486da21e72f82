"""Lets an interrupted run continue as if nothing had happened: checkpoints, and signals that wait for one."""

import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from tiedquiet.distill.options import fail, is_main_process, must_match, put, stages, steps_of


class Progress:
    """How far the current expert is; registered with accelerate once, kept in every checkpoint."""

    def begin(self, **parts: Any) -> None:
        """Start an expert; `parts` have a state of their own, such as its learning-rate schedule."""
        self.losses: list[dict[str, float]] = []
        self.parts = parts

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"losses": self.losses, **{name: part.state_dict() for name, part in self.parts.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From the checkpoint."""
        self.losses = state["losses"]
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
            if isinstance(part, LambdaLR):  # of the steps that there are now, which may be more than there were
                for group, rate, share in zip(part.optimizer.param_groups, part.base_lrs, part.lr_lambdas, strict=True):
                    group["lr"] = rate * share(part.last_epoch)


class Stopped(Exception):
    """A signal asked the run to end, and a checkpoint was saved."""

    def __init__(self, number: int, place: Path) -> None:
        super().__init__(
            f"stopped by {signal.Signals(number).name}; saved {place}; continue with --resume_from_checkpoint latest"
        )
        self.number = number


@contextlib.contextmanager
def noticing_signals() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM only leave a note, so that the step under way is finished and saved."""
    received: list[int] = []
    kinds = (signal.SIGINT, signal.SIGTERM)

    def note(number: int, frame: object) -> None:
        if not received and is_main_process():  # past Python's own buffers, which may be in use just now
            os.write(2, b"\ntiedquiet.distill: ends after this step, whose checkpoint is saved\n")
        received.append(number)

    before = [signal.signal(kind, note) for kind in kinds]
    try:
        yield received
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other runs out of an output folder; the first process locks it for all of its run.

    The lock is the operating system's, on `.lock`: it ends with the process, however that ends. The file stays, and
    means nothing by itself.

    Raises:
        SystemExit: with status 2, after one line that says who is in there.
    """
    if sys.platform == "win32" or not is_main_process():
        yield
        return
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            fail(
                f"{folder}: another run is using it ({file.read() or 'it has just begun'}); choose another --output_dir"
            )
        except OSError as error:  # some network file systems have none
            tqdm.write(
                f"{folder}: cannot be locked ({error.strerror}); make sure that no other run uses it", file=sys.stderr
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        file.flush()
        yield


def checkpoints(folder: Path) -> list[Path]:
    """A stage's checkpoints, oldest first; a copy of one under another name is its user's."""
    own = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(own, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def save_checkpoint(accelerator: Accelerator, place: Path, limit: int | None) -> None:
    """Save all state beside its place and move it there; then drop the oldest over the limit."""
    part = place.with_name(f".part-{place.name}")
    try:
        accelerator.save_state(str(part))
    except BaseException:  # a disk that is full of it would stay so
        shutil.rmtree(part, ignore_errors=True)
        raise
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        put(part, place)
        for old in checkpoints(place.parent)[: -limit if limit else 0]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def clear(out: Path) -> None:
    """Delete what a run that was killed had written in part, which may be many gigabytes. Only in a locked folder."""
    for left in (*out.glob(".part-*"), *out.glob("checkpoints/*/*/.part-*")):
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def is_finished(folder: Path, steps: int) -> bool:
    """Whether a stage has left its student, after so many steps."""
    return (folder / "student").exists() and len(json.loads((folder / "losses.json").read_text())) >= steps


def resume_from(args: Namespace, experts: list[str]) -> dict[tuple[str, str], Path | None]:
    """For each stage of each expert the checkpoint to go on from, or None.

    Raises:
        SystemExit: with status 2, after one line, where an unfinished run would be lost or does not match.
    """
    out, work, wanted = args.output_dir, args.output_dir / "checkpoints", args.resume_from_checkpoint
    parts, student = [(expert, stage) for stage in stages(args) for expert in experts], out / "student"
    if wanted is None:
        if student.exists() and (not work.exists() or (out / "metrics.json").exists()):
            fail(f"{student} is finished; choose another --output_dir, or delete it yourself")
        if work.exists():
            fail(
                f"{work}: holds an unfinished run; --resume_from_checkpoint latest continues it, another --output_dir "
                "starts a new one"
            )
        return dict.fromkeys(parts)
    grown = False
    if work.exists() or student.exists():
        grown = must_match(args, out / "args.json")
    if grown and not work.exists():
        fail(f"{student} is finished, and its checkpoints are gone; --checkpointing_steps would have kept them")
    if grown and student.exists():
        fail(f"{student} is finished, with fewer steps; move it away, and the run continues from its checkpoints")
    latest = {part: [None, *checkpoints(work / part[0] / part[1])][-1] for part in parts}
    for (expert, stage), point in latest.items():
        folder = work / expert / stage
        if is_finished(folder, steps_of(args, stage)):
            continue
        if stage == "segments" and (work / expert / "matching").exists():
            fail("--max_train_steps: the second stage builds on the first, and has begun")
        if point is None and (folder / "student").exists():
            fail(f"{folder}: has no checkpoint to continue from; --checkpointing_steps would have left one")
    if wanted == "latest":
        return latest
    place = Path(wanted).absolute()
    if not place.is_dir() or len(place.parents) < 5 or (of := (place.parents[1].name, place.parent.name)) not in parts:
        fail(f"--resume_from_checkpoint {wanted}: no checkpoint of {' or '.join(experts)} there")
    if not (settings_file := place.parents[3] / "args.json").exists():
        fail(f"--resume_from_checkpoint {wanted}: no {settings_file} to compare with")
    must_match(args, settings_file)
    at = parts.index(of)  # earlier parts continue from their newest one, later ones start over
    return {**dict.fromkeys(parts), **{part: latest[part] for part in parts[:at]}, of: place}
