"""Distil one expert: the loss, the loop, and what makes an interrupted run go on as if nothing had happened."""

import contextlib
import json
import math
import shutil
import signal
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers import WanTransformer3DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import mse_loss
from tqdm import tqdm

from tiedquiet.distill.cache import Data
from tiedquiet.distill.options import fail
from tiedquiet.distill.speed import shard, speed_up
from tiedquiet.distill.student import groups, new_student, save_weights
from tiedquiet.distill.teacher import Expert, Teacher, compute_dtype


class Taps:
    """Collects the outputs of some blocks while it is entered."""

    def __init__(self, model: WanTransformer3DModel, numbers: Sequence[int]) -> None:
        self.outputs: list[Tensor] = []
        self.open = False
        for number in numbers:
            model.blocks[number].register_forward_hook(self.take)

    def take(self, block: torch.nn.Module, inputs: Any, output: Tensor) -> None:
        """Keep an output; not those of validation, which calls the same blocks."""
        if self.open:
            self.outputs.append(output)

    def __enter__(self) -> list[Tensor]:
        self.outputs, self.open = [], True
        return self.outputs

    def __exit__(self, *exc: object) -> None:
        self.open = False


def distillation_loss(
    student: Tensor,
    target: Tensor,
    task: Tensor | None,
    features: Sequence[tuple[Tensor, Tensor]],
    weights: tuple[float, float, float],
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of up to three squared errors, in float32.

    Args:
        student: its velocity, (batch, channels, frames, height, width).
        target: the velocity to match, as `student`.
        task: the velocity of the data itself, noise - x0, as `student`; None leaves that term out.
        features: outputs of a student block and of the teacher block that teaches it, (batch, tokens, dim) each. Their
            error is relative to the teacher's mean square, for it grows from block to block.
        weights: of velocity, task and features.

    Returns:
        The loss, and its parts without their weights.
    """
    student = student.float()
    parts = {"velocity": mse_loss(student, target.float())}
    if task is not None:
        parts["task"] = mse_loss(student, task.float())
    if features:
        errors = [mse_loss(s.float(), t.float()) / t.float().square().mean() for s, t in features]
        parts["features"] = torch.stack(errors).mean()
    weight = dict(zip(("velocity", "task", "features"), weights, strict=True))
    loss = torch.stack([weight[name] * part for name, part in parts.items()]).sum()
    return loss, {name: part.detach() for name, part in parts.items()}


class Distillation:
    """One expert, its student, and one step of teaching.

    Args:
        args: the settings.
        teacher: the expert, frozen.
        student: the module that learns, maybe wrapped.
        expert: which timesteps are its own.
    """

    def __init__(
        self, args: Namespace, teacher: WanTransformer3DModel, student: WanTransformer3DModel, expert: Expert
    ) -> None:
        self.args, self.teacher, self.student, self.expert = args, teacher, student, expert
        self.dtype = teacher.dtype
        stood_for = groups(len(teacher.blocks), len(student.blocks)) if args.feature_weight else []
        self.taps = Taps(student, range(len(stood_for))), Taps(teacher, [group[-1] for group in stood_for])

    def noisy(self, x0: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Noisy latents x = (1 - sigma) x0 + sigma noise, timesteps of this expert, and the task: noise - x0."""
        sigma = self.expert.sigmas(torch.rand(len(x0), generator=generator))
        noise = torch.randn(x0.shape, generator=generator)
        wide = sigma.view(-1, 1, 1, 1, 1)
        return {"x": (1 - wide) * x0 + wide * noise, "timesteps": sigma * self.expert.steps, "task": noise - x0}

    def loss(
        self,
        x: Tensor,
        timesteps: Tensor,
        text: Tensor,
        target: Tensor | None = None,
        task: Tensor | None = None,
        empty: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one batch.

        Args:
            x: noisy latents (batch, channels, frames, height, width).
            timesteps: (batch,).
            text: embeddings (batch, tokens, text_dim).
            target: the velocity to learn, as `x`; None asks the teacher for its own.
            task: noise - x0, as `x`.
            empty: embeddings of the negative prompt, for guidance distillation.
        """
        x, text = x.to(self.dtype), text.to(self.dtype)
        ours, theirs = self.taps
        with torch.no_grad(), theirs as theirs_out:
            if target is None or self.args.feature_weight:
                velocity = self.teacher(x, timesteps, text, return_dict=False)[0]
                target = velocity if target is None else target
        if empty is not None:
            with torch.no_grad():
                away = self.teacher(x, timesteps, empty.to(self.dtype), return_dict=False)[0]
                target = away + self.args.guidance_scale * (target - away)
        with ours as ours_out:
            velocity = self.student(x, timesteps, text, return_dict=False)[0]
        weights = (self.args.velocity_weight, self.args.task_weight, self.args.feature_weight)
        return distillation_loss(velocity, target, task, list(zip(ours_out, theirs_out, strict=True)), weights)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to the GPU without waiting for what it is busy with."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def whole(tensor: Any) -> Tensor:
    """All of a tensor, also where FSDP gives each process a part; all processes must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Progress:
    """How far the expert under way is; registered with accelerate once, kept in every checkpoint."""

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


class Stopped(Exception):
    """A signal asked the run to end, and a checkpoint was saved."""

    def __init__(self, number: int, place: Path) -> None:
        super().__init__(
            f"stopped by {signal.Signals(number).name}; saved {place}; go on with --resume_from_checkpoint latest"
        )
        self.number = number


@contextlib.contextmanager
def noticing_signals() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM only leave a note, so that the step under way is finished and saved."""
    received: list[int] = []
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(kind, lambda number, frame: received.append(number)) for kind in kinds]
    try:
        yield received
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)


@contextlib.contextmanager
def warnings_above_the_bar() -> Iterator[None]:
    """Warnings, torch's compiler has many, get lines of their own instead of the middle of the bar's."""
    with warnings.catch_warnings():
        warnings.showwarning = _write_warning
        yield


def _write_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    tqdm.write(warnings.formatwarning(message, category, filename, lineno, line).rstrip(), file=sys.stderr)


def checkpoints(folder: Path) -> list[Path]:
    """An expert's checkpoints, oldest first."""
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def save_checkpoint(accelerator: Accelerator, place: Path, limit: int | None) -> None:
    """Save all state beside its place and move it there; then drop the oldest over the limit."""
    part = place.with_name(f".part-{place.name}")
    accelerator.save_state(str(part))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if place.exists():
            shutil.rmtree(place)
        part.rename(place)
        for old in checkpoints(place.parent)[: -limit if limit else 0]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def train(
    args: Namespace,
    accelerator: Accelerator,
    teacher: Teacher,
    expert: Expert,
    data: Data,
    folder: Path,
    resume: Path | None,
    progress: Progress,
    validate: Callable[[WanTransformer3DModel, int], None],
) -> None:
    """Distil one expert; leaves the student in `folder/student`, each step's loss and its parts in `losses.json`.

    Args:
        args: the settings.
        accelerator: says where and in which precision.
        teacher: the pipeline.
        expert: which of its experts.
        data: latents and embeddings.
        folder: of this expert's checkpoints.
        resume: the checkpoint to go on from.
        progress: registered with the accelerator.
        validate: called with the student and the step every `--validation_steps`.

    Raises:
        Stopped: after a signal; a checkpoint was saved.
        SystemExit: with status 2, after one line, when the loss or its gradient is no longer finite.
    """
    device, processes, micro = accelerator.device, accelerator.num_processes, args.gradient_accumulation_steps
    frozen = teacher.expert(expert, compute_dtype(args)).to(device).eval().requires_grad_(False)
    # Kept in float32 whatever is computed in: most updates are too small to move a weight of bfloat16.
    student = new_student(frozen, args.student_blocks, torch.float32).train()
    if accelerator.distributed_type is DistributedType.FSDP:
        shard(frozen, accelerator)
    one = Distillation(args, frozen, student, expert)
    speed_up(frozen, student, args)
    optimizer: Any = torch.optim.AdamW(
        student.parameters(),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        fused=True,
    )
    schedule: Any = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
    )
    # Not prepared: accelerate moves a prepared schedule on once for each process, ours counts optimizer steps.
    one.student, optimizer = accelerator.prepare(student, optimizer)
    ema = EMAModel(student.parameters(), decay=args.ema_decay) if args.use_ema else None
    progress.begin(schedule=schedule, **({"ema": ema} if ema else {}))
    if resume:
        accelerator.load_state(str(resume))
    if ema:
        ema.to(device)

    empty = len(data.prompts) - 1
    guided = args.guidance_scale > 1
    # A student that is sampled with guidance has to know where that leads away from.
    dropped = 0.0 if args.student_steps or guided or args.sample_guidance_scale == 1 else args.empty_prompt_probability

    def batch(draw: int) -> dict[str, Tensor]:
        latents, prompts, generator = data.batch(draw, accelerator.process_index, processes)
        if args.student_steps:
            inputs = data.segments(latents.float(), expert, generator)
        else:
            inputs = one.noisy(latents.float(), generator)
            drop = torch.rand(len(prompts), generator=generator) < dropped
            prompts = [empty if gone else n for n, gone in zip(prompts, drop.tolist(), strict=True)]
        inputs["text"] = data.text(prompts)
        if guided:
            inputs["empty"] = data.text([empty] * len(prompts))
        return {name: send(tensor, device) for name, tensor in inputs.items()}

    folder.mkdir(parents=True, exist_ok=True)
    ahead = batch(len(progress.losses) * micro)
    bar = tqdm(
        range(len(progress.losses), args.max_train_steps),
        expert.name,
        total=args.max_train_steps,
        initial=len(progress.losses),
        disable=not accelerator.is_local_main_process,
    )
    if accelerator.is_main_process:
        per_step = args.train_batch_size * processes * micro
        tqdm.write(
            f"***** Training {expert.name}: {args.student_blocks} of {len(frozen.blocks)} blocks, "
            f"{sum(p.numel() for p in student.parameters()):,} parameters; {args.max_train_steps} steps of {per_step} "
            f"({args.train_batch_size} x {processes} processes x {micro} accumulated), {len(data.which)} samples *****"
        )
    with noticing_signals() as received, warnings_above_the_bar():
        for step in bar:
            start = time.perf_counter()
            told: dict[str, Tensor] = {}
            for part in range(micro):
                with accelerator.accumulate(one.student):
                    with accelerator.autocast():
                        loss, parts = one.loss(**ahead)
                    accelerator.backward(loss)
                ahead = batch(step * micro + part + 1)  # while the GPU is busy with this one
                for name, value in {"loss": loss.detach(), **parts}.items():
                    told[name] = told.get(name, torch.zeros_like(value)) + value / micro
            norm = accelerator.clip_grad_norm_(one.student.parameters(), args.max_grad_norm or math.inf)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if ema:
                ema.step(student.parameters())

            done = step + 1
            told["norm"] = whole(norm).float()
            told["stop"] = torch.tensor(float(bool(received)), device=device)  # whichever process was told to
            values = accelerator.reduce(torch.stack(list(told.values())), "mean").tolist()
            numbers = dict(zip(told, values, strict=True))
            stop = numbers.pop("stop") > 0
            if not math.isfinite(numbers["loss"] + numbers.pop("norm")):  # before it gets into a checkpoint
                bar.close()
                fail(
                    f"{expert.name}, step {done}: the loss or its gradient is not finite; what was saved stays, "
                    "a lower --learning_rate may help"
                )
            progress.losses.append(
                {**numbers, "lr": optimizer.param_groups[0]["lr"], "seconds": time.perf_counter() - start}
            )
            bar.set_postfix(loss=f"{numbers['loss']:.4f}")
            accelerator.log({f"{expert.name}/{name}": value for name, value in progress.losses[-1].items()}, step=done)
            place = folder / f"checkpoint-{done}"
            if stop or (args.checkpointing_steps and done % args.checkpointing_steps == 0):
                save_checkpoint(accelerator, place, args.checkpoints_total_limit)
            if stop:
                raise Stopped(received[0] if received else signal.SIGTERM, place)
            if args.validation_steps and done % args.validation_steps == 0:
                if accelerator.is_main_process:
                    validate(accelerator.unwrap_model(one.student), done)
                accelerator.wait_for_everyone()

    if ema:
        ema.copy_to(student.parameters())
    state = accelerator.get_state_dict(one.student)
    if accelerator.is_main_process:
        (folder / "losses.json").write_text(json.dumps(progress.losses))
        save_weights(student.config, state, folder / "student")
    accelerator.free_memory()
    accelerator.wait_for_everyone()
