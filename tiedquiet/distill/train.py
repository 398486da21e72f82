r"""Distil a Wan text-to-video pipeline into a student that draws a clip in two unguided steps, or with fewer blocks.

    python -m tiedquiet.distill                                  # a tiny teacher that ships with the package, on a CPU
    python -m tiedquiet.distill --show_broken_tie                # and what a broken tie does to it

    python -m tiedquiet.distill \
        --pretrained_model_name_or_path Wan-AI/Wan2.1-T2V-1.3B-Diffusers --output_dir wan-2-steps \
        --lora_rank 64 --gradient_checkpointing attention --compile \
        --checkpointing_steps 100 --resume_from_checkpoint latest       # --plan first: what it will take

    accelerate launch -m tiedquiet.distill ...                   # more GPUs, more machines
    accelerate launch --use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP \
        --fsdp_transformer_layer_cls_to_wrap WanTransformerBlock -m tiedquiet.distill \
        --pretrained_model_name_or_path Wan-AI/Wan2.2-T2V-A14B-Diffusers --expert high ...

In order: the text encoder's ties are proven and the prompt embeddings cached. With --student_steps N the guided
teacher's paths are cached at N + 1 nodes, and each expert's student learns the segments that start on its side; with
--distribution_matching_steps, its own clips are then moved to where the teacher would have them. With --student_steps 0
latents are encoded from clips (--train_data_dir) or sampled by the teacher (--prompts_file), and each student learns
the teacher's velocity. Then the student is written as a pipeline folder that WanPipeline loads, or as adapters.
"""

import contextlib
import json
import math
import os
import shutil
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    set_seed,
)
from diffusers import WanTransformer3DModel
from diffusers.optimization import get_scheduler
from torch import Tensor
from tqdm import tqdm

from tiedquiet.distill.average import Average
from tiedquiet.distill.checkpoint import (
    Progress,
    Stopped,
    alone_in,
    clear,
    is_finished,
    noticing_signals,
    resume_from,
    save_checkpoint,
)
from tiedquiet.distill.console import in_one_line, words_above_the_bar
from tiedquiet.distill.data import Data, named
from tiedquiet.distill.evaluate import Judge
from tiedquiet.distill.lora import FILE, Adapter
from tiedquiet.distill.losses import (
    clip_of,
    critic_loss,
    distribution_matching_loss,
    guided,
    renoised,
    velocity_loss,
)
from tiedquiet.distill.options import check, fail, is_main_process, parse, settings, stages, steps_of, write_text
from tiedquiet.distill.output import export, write_pipeline
from tiedquiet.distill.pipeline import (
    Expert,
    Nodes,
    Teacher,
    check_nodes,
    compute_dtype,
    guidance,
    load_student,
    new_student,
    readable,
    save_weights,
)
from tiedquiet.distill.plan import check_space, plan
from tiedquiet.distill.report import track_film
from tiedquiet.distill.sources import read_metadata, read_prompts
from tiedquiet.distill.speed import check_fsdp, check_kernels, clipped, shard, speed_up, unexchanged, whole


class Distillation:
    """One expert, its student, maybe a critic, and what they compute in one step.

    Args:
        args: the settings.
        teacher: the expert, frozen.
        student: the module that learns, maybe wrapped.
        expert: which timesteps are its own.
        critic: of the second stage: learns what the student draws, maybe wrapped.
        nodes: of the student's steps, for the second stage.
        earlier: the finished student of the nodes before this expert's own, if there are such nodes; the batch begins
            at the first of its own otherwise.
    """

    def __init__(
        self,
        args: Namespace,
        teacher: WanTransformer3DModel,
        student: WanTransformer3DModel,
        expert: Expert,
        critic: Any = None,
        nodes: Nodes | None = None,
        earlier: WanTransformer3DModel | None = None,
    ) -> None:
        self.args, self.teacher, self.student, self.expert = args, teacher, student, expert
        self.critic, self.nodes, self.earlier = critic, nodes, earlier
        self.dtype = teacher.dtype

    def noisy(self, x0: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Noisy latents x = (1 - sigma) x0 + sigma noise, timesteps of this expert, and the task: noise - x0."""
        sigma = self.expert.sigmas(torch.rand(len(x0), generator=generator))
        noise = torch.randn(x0.shape, generator=generator)
        return {"x": renoised(x0, sigma, noise), "timesteps": sigma * self.expert.steps, "task": noise - x0}

    def velocity(self, model: Any, x: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        """Of teacher, student or critic, as latents; `timesteps` is (batch,)."""
        velocity: Tensor = model(x.to(self.dtype), timesteps, text.to(self.dtype), return_dict=False)[0]
        return velocity

    @torch.no_grad()
    def guidance(self, x: Tensor, timesteps: Tensor, text: Tensor, empty: Tensor | None, scale: float) -> Tensor:
        """The teacher's velocity, guided where there are embeddings of the negative prompt."""
        towards = self.velocity(self.teacher, x, timesteps, text)
        return towards if empty is None else guided(towards, self.velocity(self.teacher, x, timesteps, empty), scale)

    def loss(
        self,
        x: Tensor,
        timesteps: Tensor,
        text: Tensor,
        target: Tensor | None = None,
        task: Tensor | None = None,
        empty: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The first stage's loss of one batch, and its parts.

        Args:
            x: noisy latents (batch, channels, frames, height, width).
            timesteps: (batch,).
            text: embeddings (batch, tokens, text_dim).
            target: the velocity to learn, as `x`; None asks the teacher for its own.
            task: noise - x0, as `x`.
            empty: embeddings of the negative prompt, for guidance distillation.
        """
        if target is None:
            target = self.guidance(x, timesteps, text, empty, self.args.guidance_scale)
        return velocity_loss(self.velocity(self.student, x, timesteps, text), target, task, self.args.task_weight)

    @torch.no_grad()
    def own_state(self, x: Tensor, text: Tensor, first: int, node: int) -> Tensor:
        """Where the student is at a node, by its own Euler steps from an earlier one.

        Args:
            x: latents at node `first`.
            text: embeddings.
            first: the node to begin at.
            node: the node to reach; at those before this expert's own, `earlier` steps.
        """
        assert self.nodes is not None
        for n in range(first, node):
            model = self.student if n in self.nodes.of(self.expert) else self.earlier
            velocity = self.velocity(model, x, self.nodes.timesteps[n].expand(len(x)).to(x.device), text)
            x = x - (self.nodes.sigmas[n] - self.nodes.sigmas[n + 1]) * velocity.float()
        return x

    def matching(
        self, x: Tensor, node: int, text: Tensor, empty: Tensor, sigma: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The second stage's loss of the student, and the clips, (batch, channels, frames, height, width), it drew.

        Both scores are asked on this expert's side of the boundary, where alone the teacher's expert knows them.

        Args:
            x: the student's own state at a node.
            node: which.
            text: embeddings.
            empty: embeddings of the negative prompt.
            sigma: (batch,), how far the clips are renoised.
            noise: as `x`.
        """
        assert self.nodes is not None
        at = self.nodes.sigmas[node].expand(len(x)).to(x.device)
        timesteps = self.nodes.timesteps[node].expand(len(x)).to(x.device)
        clip = clip_of(x, at, self.velocity(self.student, x, timesteps, text))
        with torch.no_grad():
            again, timesteps = renoised(clip, sigma, noise), sigma * self.expert.steps
            scales = list(guidance(self.args).values())  # a second one is that of Wan2.2's low-noise expert
            scale = scales[-1 if self.expert.name == "transformer_2" else 0]
            real = self.guidance(again, timesteps, text, empty, scale)
            fake = self.velocity(self.critic, again, timesteps, text)
        matched = distribution_matching_loss(clip, clip_of(again, sigma, real), clip_of(again, sigma, fake))
        return matched, clip.detach()

    def criticism(self, clip: Tensor, text: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        """The critic's loss on clips that the student drew; `sigma` and `noise` as for `matching`."""
        velocity = self.velocity(self.critic, renoised(clip, sigma, noise), sigma * self.expert.steps, text)
        return critic_loss(velocity, clip, noise)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to the GPU without waiting for what it is busy with."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def train(
    args: Namespace,
    accelerator: Accelerator,
    teacher: Teacher,
    expert: Expert,
    stage: str,
    data: Data,
    work: Path,
    resume: Path | None,
    progress: Progress,
    validate: Callable[[Expert, WanTransformer3DModel, str], Path | None],
    steps_before: int,
) -> None:
    """One stage of one expert; leaves the student in `work/EXPERT/STAGE/student`, its losses in `losses.json`.

    Args:
        args: the settings.
        accelerator: says where and in which precision.
        teacher: the pipeline.
        expert: which of its experts.
        stage: one of `stages(args)`; `matching` continues with the student of the stage before.
        data: latents and embeddings.
        work: the folder of all stages and their checkpoints.
        resume: the checkpoint to continue from.
        progress: registered with the accelerator.
        validate: called with the expert, its student and the name of a video every `--validation_steps`.
        steps_before: of other stages and experts; trackers want to count on.

    Raises:
        Stopped: after a signal; a checkpoint was saved.
        SystemExit: with status 2, after one line, when the loss or its gradient is no longer finite.
    """
    device, processes, micro = accelerator.device, accelerator.num_processes, args.gradient_accumulation_steps
    matching, folder, name = stage == "matching", work / expert.name / stage, f"{expert.name}, {stage}"
    frozen = teacher.expert(expert, compute_dtype(args)).eval().requires_grad_(False)
    # Kept in float32 whatever is computed in: most updates are too small to move a weight of bfloat16.
    begun = folder.with_name("segments") if matching and args.max_train_steps else None
    asked: Any = frozen
    student: Any
    critic: Any = None
    if args.lora_rank:
        asked = Adapter(frozen.to(device), None)
        student = Adapter(frozen, "student").add(args.lora_rank, args.seed, begun and begun / "student" / FILE)
        critic = Adapter(frozen, "critic").add(args.lora_rank, args.seed + 1) if matching else None
    else:
        loaded = load_student(teacher, expert, begun, torch.float32) if begun else None
        student = (loaded or new_student(frozen, args.student_blocks, torch.float32)).to(device).train()
        critic = new_student(frozen, len(frozen.blocks), torch.float32).to(device).train() if matching else None
    first = data.nodes.of(expert)[0] if matching else 0
    before = work / teacher.experts[0].name / stage
    earlier = None
    if first and (before / "student").exists():
        earlier = load_student(teacher, teacher.experts[0], before, compute_dtype(args)).to(device)
        earlier = earlier.eval().requires_grad_(False)
        first = 0
    # Where its cached paths say all, the teacher is not asked.
    still = [model for model in (frozen if matching or not args.student_steps else None, earlier) if model]
    for model in still:
        model.to(device)
    is_sharded = accelerator.distributed_type is DistributedType.FSDP
    if is_sharded:
        shard(still, accelerator)
    one = Distillation(args, asked, student, expert, critic, data.nodes, earlier)
    if args.lora_rank:  # all three are one model
        speed_up([], [frozen, *([earlier] if earlier else [])], args)
    else:
        speed_up([frozen, *([earlier] if earlier else [])], [student, *([critic] if critic else [])], args)
    steps = steps_of(args, stage)

    def learner(model: Any, rate: float) -> tuple[Any, Any, Any]:
        optimizer: Any = torch.optim.AdamW(
            model.parameters(),
            lr=rate,
            betas=(0.0 if matching else args.adam_beta1, args.adam_beta2),
            weight_decay=args.adam_weight_decay,
            fused=True,
        )
        warmup = 0 if matching else args.lr_warmup_steps
        schedule = get_scheduler(args.lr_scheduler, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
        # Not prepared: accelerate moves a prepared schedule on once for each process, ours counts optimizer steps.
        if args.lora_rank:
            return model, accelerator.prepare(optimizer), schedule
        return *accelerator.prepare(model, optimizer), schedule

    one.student, optimizer, schedule = learner(student, args.matching_learning_rate if matching else args.learning_rate)
    ema = Average(student.parameters(), decay=args.ema_decay) if args.use_ema else None
    kept = {"schedule": schedule, **({"ema": ema} if ema else {})}
    if critic:
        one.critic, critic_optimizer, critic_schedule = learner(critic, args.critic_learning_rate)
        kept["critic_schedule"] = critic_schedule
    if args.lora_rank:  # accelerate saves the models that it prepares
        kept |= {"student": student, **({"critic": critic} if critic else {})}
    progress.begin(**kept)
    if resume:
        with readable(resume):
            accelerator.load_state(str(resume))
    if ema:
        ema.to(device)

    empty = len(data.prompts) - 1
    guided = args.guidance_scale > 1 or matching
    # A student that is sampled with guidance has to know where that leads away from.
    dropped = 0.0 if args.student_steps or guided or args.sample_guidance_scale == 1 else args.empty_prompt_probability

    def batch(draw: int) -> dict[str, Any]:
        latents, prompts, generator = data.batch(draw, accelerator.process_index, processes)
        inputs: dict[str, Any] = {}
        if not args.student_steps:
            inputs = one.noisy(latents, generator)
            drop = torch.rand(len(prompts), generator=generator) < dropped
            prompts = [empty if gone else n for n, gone in zip(prompts, drop.tolist(), strict=True)]
        elif args.segment_weight or not matching:
            inputs = data.segments(latents, expert, generator)
        inputs["text"] = data.text(prompts)
        if guided:
            inputs["empty"] = data.text([empty] * len(prompts))
        if matching:
            own = data.nodes.of(expert)
            inputs["node"] = own[draw % len(own)]  # the same in all processes, so that all of them pass as often
            form = (len(prompts), *data.form)
            inputs["start"] = latents[:, first] if first else torch.randn(form, generator=generator)
            uniform = torch.rand(1 + args.critic_steps, len(prompts), generator=generator)
            inputs["sigma"] = torch.stack([expert.sigmas(0.02 + 0.96 * each) for each in uniform])
            inputs["noise"] = torch.randn(1 + args.critic_steps, *form, generator=generator)
        return {n: send(one, device) if isinstance(one, Tensor) else one for n, one in inputs.items()}

    folder.mkdir(parents=True, exist_ok=True)
    offset = args.max_train_steps * micro if matching else 0  # the second stage goes on drawing where the first ended
    ahead = batch(offset + len(progress.losses) * micro)
    bar = tqdm(
        range(len(progress.losses), steps),
        name,
        total=steps,
        initial=len(progress.losses),
        disable=not accelerator.is_local_main_process,
    )
    if accelerator.is_main_process:
        per_step = args.train_batch_size * processes * micro
        tqdm.write(
            f"***** Training {name}: {args.student_blocks} of {len(frozen.blocks)} blocks, "
            f"{sum(p.numel() for p in student.parameters()):,} parameters; {steps} steps of {per_step} "
            f"({args.train_batch_size} x {processes} processes x {micro} accumulated), {len(data.which)} samples *****"
        )
    told: dict[str, Tensor] = {}

    def learn(model: Any, loss: Tensor, **parts: Tensor) -> None:
        """Backward. `parts` are what is told of it, summed up over a step."""
        if args.lora_rank:
            model.activate()
        accelerator.backward(loss)
        for part, value in parts.items():
            told[part] = told.get(part, torch.zeros_like(value)) + value.detach() / micro

    with noticing_signals() as received, words_above_the_bar():
        for step in bar:
            clock = time.perf_counter()
            told.clear()
            drawn = []
            for part in range(micro):
                last = part == micro - 1
                if not matching:
                    with unexchanged(accelerator, one.student, last):
                        with accelerator.autocast():
                            loss, parts = one.loss(**ahead)
                        learn(one.student, loss, total=loss, **parts)
                else:
                    text, sigma, noise = ahead["text"], ahead["sigma"], ahead["noise"]
                    with accelerator.autocast():
                        x = one.own_state(ahead["start"], text, first, ahead["node"])
                    with unexchanged(accelerator, one.student, last and not args.segment_weight):
                        with accelerator.autocast():
                            loss, clip = one.matching(x, ahead["node"], text, ahead["empty"], sigma[0], noise[0])
                        learn(one.student, loss, matching=loss)
                    if args.segment_weight:
                        with unexchanged(accelerator, one.student, last):
                            with accelerator.autocast():
                                loss, _ = one.loss(ahead["x"], ahead["timesteps"], text, ahead["target"])
                            learn(one.student, args.segment_weight * loss, segments=loss)
                    drawn.append((clip, text, sigma[1:], noise[1:]))
                ahead = batch(offset + step * micro + part + 1)  # while the GPU is busy with this one
            norm = clipped(accelerator, one.student, args.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if ema:
                ema.step(student.parameters())
            told["norm"] = whole(norm).float()

            for again in range(args.critic_steps if matching else 0):
                for part, (clip, text, sigma, noise) in enumerate(drawn):
                    with unexchanged(accelerator, one.critic, part == micro - 1):
                        with accelerator.autocast():
                            loss = one.criticism(clip, text, sigma[again], noise[again])
                        learn(one.critic, loss, critic=loss / args.critic_steps)
                told["norm"] += whole(clipped(accelerator, one.critic, args.max_grad_norm)).float()
                critic_optimizer.step()
                critic_optimizer.zero_grad()
            if matching:
                critic_schedule.step()

            done = step + 1
            told["stop"] = torch.tensor(float(bool(received)), device=device)  # whichever process was told to
            values = accelerator.reduce(torch.stack(list(told.values())), "mean").tolist()
            numbers = dict(zip(told, values, strict=True))
            stop = numbers.pop("stop") > 0
            if not math.isfinite(sum(numbers.values())):  # before it gets into a checkpoint
                bar.close()
                fail(
                    f"{name}, step {done}: the loss or its gradient is not finite; what was saved is kept; "
                    "a lower learning rate may help"
                )
            del numbers["norm"]
            progress.losses.append(
                {**numbers, "lr": optimizer.param_groups[0]["lr"], "seconds": time.perf_counter() - clock}
            )
            bar.set_postfix({part: f"{value:.4f}" for part, value in numbers.items()})
            tracked = {f"{expert.name}/{stage}/{key}": value for key, value in progress.losses[-1].items()}
            accelerator.log(tracked, step=steps_before + done)
            place = folder / f"checkpoint-{done}"
            if stop or (args.checkpointing_steps and (done % args.checkpointing_steps == 0 or done == steps)):
                save_checkpoint(accelerator, place, args.checkpoints_total_limit)
            if stop:
                raise Stopped(received[0] if received else signal.SIGTERM, place)
            if args.validation_steps and done % args.validation_steps == 0:
                if accelerator.is_main_process or is_sharded:  # a sharded student draws in all processes or in none
                    if args.lora_rank:
                        student.activate()
                    shown = frozen if args.lora_rank else accelerator.unwrap_model(one.student)
                    with ema.shown_in(student.parameters()) if ema else contextlib.nullcontext():
                        film = validate(expert, shown, f"{expert.name}-{stage}-{done}")
                    if film:
                        track_film(accelerator.trackers, film, f"{expert.name}/{stage}", steps_before + done)
                accelerator.wait_for_everyone()

        if ema:
            ema.copy_to(student.parameters())
        state = {} if args.lora_rank else accelerator.get_state_dict(one.student)
        if accelerator.is_main_process:
            shutil.rmtree(folder / "student", ignore_errors=True)  # of fewer steps than the losses are about to tell of
            write_text(folder / "losses.json", json.dumps(progress.losses))
            if args.lora_rank:
                student.save(folder / "student")
            else:
                save_weights(student.config, state, folder / "student")
        accelerator.free_memory()
        accelerator.wait_for_everyone()
        stop = accelerator.reduce(torch.tensor(float(bool(received)), device=device)).item() > 0
    if stop:  # told since the last step
        raise Stopped(received[0] if received else signal.SIGTERM, folder / "student")


def main(argv: list[str] | None = None) -> int:
    """Run it; returns the exit status."""
    start = time.perf_counter()
    args = parse(__doc__, argv)
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()  # those of loading; ours remain
    if args.export:
        return export(args) if is_main_process() else 0
    teacher = Teacher(args.pretrained_model_name_or_path, args.revision, args.flow_shift)
    check(args, teacher.index, teacher.transformer, teacher.vae)
    check_kernels(args)
    experts = {"high": teacher.experts[:1], "low": teacher.experts[1:], "both": teacher.experts}[args.expert]
    names = [expert.name for expert in experts]
    check_nodes(teacher, experts, args)
    clips = read_metadata(args) if args.train_data_dir else []
    prompts = [text for _, text in clips] or read_prompts(args)
    args.samples = named(json.dumps([prompts, [os.path.relpath(path, args.train_data_dir) for path, _ in clips]]))
    resume_from(args, names)  # refuses before anything is written
    data = Data(args, prompts, [path for path, _ in clips])
    data.look(teacher, compute_dtype(args))
    check_space(args, teacher, names, data)
    if args.plan:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if is_main_process():  # the others would measure on the same GPU at the same time
            print("\n".join(plan(args, teacher, experts, data, int(os.environ.get("WORLD_SIZE", "1")), device).lines))
        return 0

    # Under FSDP, transformers would leave the text encoder empty in all processes but the first.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=args.report_to,
        # The others wait while one writes and samples; torch gives up on them after ten minutes.
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(days=1)),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # or each would be there twice
        ],
        project_config=ProjectConfiguration(
            project_dir=str(args.output_dir), logging_dir=str(args.output_dir / "logs")
        ),
    )
    if accelerator.distributed_type is DistributedType.FSDP:
        check_fsdp(args, accelerator)
    with alone_in(args.output_dir):
        return distil(args, accelerator, teacher, experts, data, start)


def distil(
    args: Namespace, accelerator: Accelerator, teacher: Teacher, experts: list[Expert], data: Data, start: float
) -> int:
    """What `main` has checked: all stages of all experts, then the student and what it is worth.

    Args:
        args: the settings.
        accelerator: says where and in which precision.
        teacher: the pipeline.
        experts: those of the teacher's that get a student.
        data: knows its prompts and caches.
        start: when it began, by `time.perf_counter`.

    Returns:
        The exit status.
    """
    names, out, work = [expert.name for expert in experts], args.output_dir, args.output_dir / "checkpoints"
    resume = resume_from(args, names)  # once more: until the folder was locked, another run may have been in it
    finished = (out / "student").exists() and (not work.exists() or (out / "metrics.json").exists())
    if args.resume_from_checkpoint and finished:
        accelerator.print(f"{out / 'student'} is finished")
        return 0
    dtype = compute_dtype(args)
    set_seed(args.seed)
    told = settings(args)
    if accelerator.is_main_process:
        clear(out)
        write_text(out / "args.json", json.dumps(told, indent=1) + "\n")
        (out / "metrics.json").unlink(missing_ok=True)  # written last, it tells that a run is finished
    accelerator.wait_for_everyone()
    accelerator.init_trackers("tiedquiet-distill", {k: v for k, v in told.items() if isinstance(v, int | float | str)})

    phases: dict[str, dict[str, float]] = {}

    def ended(phase: str) -> None:
        spent = sum(one["seconds"] for one in phases.values())
        phases[phase] = {"seconds": round(time.perf_counter() - start - spent, 1)}
        if accelerator.device.type == "cuda":  # pragma: no cover - needs a GPU
            phases[phase]["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
            torch.cuda.reset_peak_memory_stats()

    if accelerator.is_main_process:
        planned = plan(args, teacher, experts, data, accelerator.num_processes, accelerator.device)
        print(*(f"plan: {line}" for line in planned.lines), sep="\n")
    data.prepare(teacher, accelerator, dtype)
    ended("start, prompts, paths" if args.student_steps else "start, prompts, latents")
    judge = Judge(teacher, data, accelerator.device, dtype)
    progress = Progress()
    accelerator.register_for_checkpointing(progress)
    # Stage by stage, so that validation has a student of every expert as soon as it can.
    steps_before = 0
    for stage, expert in ((stage, expert) for stage in stages(args) for expert in experts):
        if not is_finished(work / expert.name / stage, steps_of(args, stage)):
            point = resume[expert.name, stage]
            try:
                train(
                    args, accelerator, teacher, expert, stage, data, work, point, progress, judge.validate, steps_before
                )
            except Stopped as stopped:
                accelerator.end_training()
                accelerator.print(f"tiedquiet.distill: {stopped}", file=sys.stderr)
                return 128 + stopped.number
        steps_before += steps_of(args, stage)
        if expert is experts[-1]:
            ended(f"training, {stage}")
    if accelerator.is_main_process:
        try:
            if not (out / "student").exists():  # it does where an earlier run was interrupted later than this
                trained = {name: work / name / stages(args)[-1] / "student" for name in names}
                write_pipeline(args, teacher, trained, out / "student")
            ended("writing the student")
            metrics = judge.report(experts)
            ended("samples and pictures")
        except (KeyboardInterrupt, torch.OutOfMemoryError) as error:  # a clip is decoded whole, in float32
            is_told, done = (
                isinstance(error, KeyboardInterrupt),
                "the student" if (out / "student").exists() else "training",
            )
            why = "interrupted" if is_told else "the GPU's memory does not suffice to draw samples"
            print(
                f"tiedquiet.distill: {why}; {done} is complete; --resume_from_checkpoint latest finishes",
                file=sys.stderr,
            )
            return 128 + signal.SIGINT if is_told else 2
        metrics |= {"processes": accelerator.num_processes, "distributed": accelerator.distributed_type.value}
        metrics |= {"phases": phases, "planned": planned.told()}
        metrics["seconds"] = round(time.perf_counter() - start, 1)
        write_text(out / "metrics.json", json.dumps(metrics, indent=1) + "\n")
        if not args.checkpointing_steps:
            shutil.rmtree(work)
        print(f"student: {out / 'student'} ({metrics['seconds']:.0f} s); next to it pictures, metrics.json, args.json")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return 0


def run() -> int:
    """`main`, with one line instead of a traceback where the world is not as it should be; returns the exit status."""
    return in_one_line(main)
