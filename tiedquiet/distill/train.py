r"""Distil a Wan text-to-video pipeline into a student that draws a clip in four unguided steps, or with fewer blocks.

    python -m tiedquiet.distill                                  # a tiny teacher that ships with the package, on a CPU
    python -m tiedquiet.distill --show_broken_tie                # and what a broken tie does to it

    python -m tiedquiet.distill \
        --pretrained_model_name_or_path Wan-AI/Wan2.1-T2V-1.3B-Diffusers \
        --prompts_file prompts.txt --output_dir wan-4-steps --student_steps 4 --student_blocks 15 \
        --mixed_precision bf16 --gradient_checkpointing attention --compile \
        --checkpointing_steps 500 --resume_from_checkpoint latest

    accelerate launch -m tiedquiet.distill ...                   # more GPUs, more machines
    accelerate launch --use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP \
        --fsdp_transformer_layer_cls_to_wrap WanTransformerBlock -m tiedquiet.distill \
        --pretrained_model_name_or_path Wan-AI/Wan2.2-T2V-A14B-Diffusers --expert high ...

Down the page: the text encoder's ties are proven and the prompt embeddings cached. With --student_steps N the guided
teacher's paths are cached at N + 1 nodes, and each expert's student learns the segments that start on its side;
without it, latents are encoded from clips (--train_data_dir) or sampled by the teacher (--prompts_file), and each
student learns the teacher's velocity. Then the student is written as a pipeline folder that WanPipeline loads.
"""

import contextlib
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import diffusers
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, ProjectConfiguration, set_seed
from diffusers import WanTransformer3DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import mse_loss
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from tiedquiet.distill.checkpoint import Progress, Stopped, noticing_signals, resume_from, save_checkpoint
from tiedquiet.distill.data import Data, read_metadata, read_prompts
from tiedquiet.distill.evaluate import Judge
from tiedquiet.distill.options import check, fail, parse, settings, write_text
from tiedquiet.distill.pipeline import (
    Expert,
    Teacher,
    check_space,
    compute_dtype,
    new_student,
    save_weights,
    write_pipeline,
)
from tiedquiet.distill.speed import check_kernels, shard, speed_up


def distillation_loss(
    student: Tensor, target: Tensor, task: Tensor | None, task_weight: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The squared error of a velocity, in float32; and, weighted, that against the velocity of the data itself.

    Args:
        student: its velocity, (batch, channels, frames, height, width).
        target: the velocity to match, as `student`.
        task: noise - x0, as `student`; None leaves that term out.
        task_weight: of the second term.

    Returns:
        The loss, and its parts without their weights.
    """
    parts = {"velocity": mse_loss(student.float(), target.float())}
    loss = parts["velocity"]
    if task is not None:
        parts["task"] = mse_loss(student.float(), task.float())
        loss = loss + task_weight * parts["task"]
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
        if target is None:
            with torch.no_grad():
                target = self.teacher(x, timesteps, text, return_dict=False)[0]
                if empty is not None:
                    away = self.teacher(x, timesteps, empty.to(self.dtype), return_dict=False)[0]
                    target = away + self.args.guidance_scale * (target - away)
        velocity = self.student(x, timesteps, text, return_dict=False)[0]
        return distillation_loss(velocity, target, task, self.args.task_weight)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to the GPU without waiting for what it is busy with."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def whole(tensor: Any) -> Tensor:
    """All of a tensor, also where FSDP gives each process a part; all processes must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextlib.contextmanager
def words_above_the_bar() -> Iterator[None]:
    """Warnings and log lines, torch's compiler has many, get lines of their own instead of the middle of the bar's."""
    loggers = [logging.root, *map(logging.getLogger, list(logging.root.manager.loggerDict))]
    console = [one for one in loggers if any(getattr(it, "stream", None) is sys.stderr for it in one.handlers)]
    with warnings.catch_warnings(), logging_redirect_tqdm(console):
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
    frozen = teacher.expert(expert, compute_dtype(args)).eval().requires_grad_(False)
    # Kept in float32 whatever is computed in: most updates are too small to move a weight of bfloat16.
    student = new_student(frozen, args.student_blocks, torch.float32).to(device).train()
    asked = not args.student_steps  # or else its cached paths say all
    if asked:
        frozen.to(device)
    if accelerator.distributed_type is DistributedType.FSDP:
        shard(frozen if asked else None, accelerator)
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
    with noticing_signals() as received, words_above_the_bar():
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


def main(argv: list[str] | None = None) -> int:
    """Run it; returns the exit status."""
    start = time.perf_counter()
    args = parse(__doc__, argv)
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()  # those of loading; ours remain
    teacher = Teacher(args.pretrained_model_name_or_path, args.revision)
    check(args, teacher.index, teacher.transformer, teacher.vae)
    check_kernels(args)
    experts = {"high": teacher.experts[:1], "low": teacher.experts[1:], "both": teacher.experts}[args.expert]
    names = [expert.name for expert in experts]
    clips = read_metadata(args) if args.train_data_dir else []
    prompts = [text for _, text in clips] or read_prompts(args)
    out, work = args.output_dir, args.output_dir / "checkpoints"
    resume = resume_from(args, names)
    if args.resume_from_checkpoint and not work.exists() and (out / "student").exists():
        print(f"{out / 'student'} is finished")
        return 0
    share = args.student_blocks / teacher.transformer["num_layers"]
    check_space(teacher, names, share, out, args.checkpoints_total_limit + 1 if args.checkpointing_steps else 1)

    # Under FSDP, transformers would leave the text encoder empty in all processes but the first.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=args.report_to,
        # The others wait while one writes and samples; torch gives up on them after ten minutes.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))],
        project_config=ProjectConfiguration(project_dir=str(out), logging_dir=str(out / "logs")),
    )
    if accelerator.distributed_type is DistributedType.FSDP:
        if args.use_ema or args.validation_steps:
            fail("--use_ema and --validation_steps need whole weights on one GPU; under FSDP no GPU has them")
        if not accelerator.is_fsdp2:
            fail("FSDP 1 would round the timesteps that it hands in: accelerate launch --fsdp_version 2")
    dtype = compute_dtype(args)
    set_seed(args.seed)
    told = settings(args)
    if accelerator.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "args.json", json.dumps(told, indent=1) + "\n")
    accelerator.wait_for_everyone()
    accelerator.init_trackers("tiedquiet-distill", {k: v for k, v in told.items() if isinstance(v, int | float | str)})

    phases: dict[str, dict[str, float]] = {}

    def ended(phase: str) -> None:
        spent = sum(one["seconds"] for one in phases.values())
        phases[phase] = {"seconds": round(time.perf_counter() - start - spent, 1)}
        if accelerator.device.type == "cuda":  # pragma: no cover - needs a GPU
            phases[phase]["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
            torch.cuda.reset_peak_memory_stats()

    data = Data(args, prompts, [path for path, _ in clips])
    data.prepare(teacher, accelerator, dtype)
    ended("start, prompts, paths" if args.student_steps else "start, prompts, latents")
    judge = Judge(teacher, data, accelerator.device, dtype)
    progress = Progress()
    accelerator.register_for_checkpointing(progress)
    for expert in experts:
        if not (work / expert.name / "student").exists():
            validate = partial(judge.validate, expert.name)
            try:
                train(
                    args,
                    accelerator,
                    teacher,
                    expert,
                    data,
                    work / expert.name,
                    resume[expert.name],
                    progress,
                    validate,
                )
            except Stopped as stopped:
                accelerator.end_training()
                accelerator.print(f"tiedquiet.distill: {stopped}", file=sys.stderr)
                return 128 + stopped.number

    ended("training")
    if accelerator.is_main_process:
        try:
            if not (out / "student").exists():  # it does where an earlier run was interrupted later than this
                trained = {name: work / name / "student" for name in names}
                write_pipeline(teacher, trained, out / "student", args.student_steps)
            ended("writing the student")
            metrics = judge.report(experts)
            ended("samples and pictures")
        except KeyboardInterrupt:
            done = "the student is complete" if (out / "student").exists() else "training is complete"
            print(f"tiedquiet.distill: interrupted; {done}; --resume_from_checkpoint latest finishes", file=sys.stderr)
            return 128 + signal.SIGINT
        metrics |= {"processes": accelerator.num_processes, "distributed": accelerator.distributed_type.value}
        metrics["phases"] = phases
        metrics["seconds"] = round(time.perf_counter() - start, 1)
        write_text(out / "metrics.json", json.dumps(metrics, indent=1) + "\n")
        shutil.rmtree(work)
        print(f"student: {out / 'student'} ({metrics['seconds']:.0f} s); beside it pictures, metrics.json, args.json")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return 0


def run() -> int:
    """`main`, with one line instead of a traceback where the world is not as it should be; returns the exit status."""
    try:
        return main()
    except KeyboardInterrupt:  # outside training, which saves a checkpoint
        print("tiedquiet.distill: interrupted; what was cached stays", file=sys.stderr)
        return 128 + signal.SIGINT
    except OSError as error:  # a full or read-only disk, at any moment
        fail(f"{error.filename or 'the disk'}: {error.strerror or ' '.join(str(error).split())[:200]}")
    except (SafetensorError, RuntimeError) as error:  # that is what the disk's errors become in their writers
        refused = re.search(r"I/O error: (.+?) \(os error|inline_container|PytorchStreamWriter", str(error))
        if not refused:
            raise
        fail(f"the disk: {refused[1] or 'a checkpoint could not be written'}; what was saved before stays")
