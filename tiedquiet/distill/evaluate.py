"""Evaluation: metrics that are arithmetic on pixels, and pictures."""

import copy
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from torch import Tensor
from tqdm import tqdm

from tiedquiet.distill.data import Data, decode, sample
from tiedquiet.distill.lora import file_name, with_lora
from tiedquiet.distill.options import is_main_process, stages
from tiedquiet.distill.output import write_card
from tiedquiet.distill.pipeline import NO_GUIDANCE, Expert, Teacher, few_steps, guidance, load_student, new_student
from tiedquiet.distill.report import draw_loss, draw_samples, table, write_film
from tiedquiet.distill.speed import is_sharded, spread
from tiedquiet.distill.tiny.clips import PROMPTS, Reading, read

SEEDS = (1_000, 1_001, 1_002, 1_003)  # of the clips that are judged
FEW = 4  # at which a student that learnt the velocity is judged as well
SHOWN = {  # in the pictures: every colour, shape and direction
    "a red circle moving left",
    "a green square moving up",
    "a blue triangle moving right",
    "a yellow circle moving down",
}


@dataclass(frozen=True)
class Arm:
    """A way of sampling.

    Attributes:
        steps: how many.
        scales: of classifier-free guidance, as the pipeline calls them; 1 is none.
        blocks: of each transformer.
        euler: whether it takes the steps of a student of few steps, instead of those of the teacher's scheduler.
        students: makes what takes the place of the experts, by their names.
    """

    steps: int
    scales: dict[str, float]
    blocks: int
    euler: bool
    students: Callable[[], dict[str, WanTransformer3DModel]] = dict


def measure(clips: Tensor, prompts: Sequence[str], reference: Tensor) -> dict[str, float]:
    """Compare clips with those that another pipeline, the reference, draws for the same prompts from the same seeds.

    - `psnr`: 10 log10(1 / mean square error) in dB over all pixels of a clip, the mean over the clips.
    - `adherence`: the share that reads back as its prompt. Guessing among the 48 prompts gives 2.1 %.
    - `spread_of_place`, `spread_of_size`: the standard deviation within a prompt, over the seeds and pooled over the
      prompts, as a fraction of the reference's: a pipeline that forgot some of what a prompt can mean has less than 1.
    - `speed_of_motion`: the mean, as a fraction of the reference's.

    Args:
        clips: (clips, frames, 3, height, width), 0 to 1.
        prompts: one for each; if any is not of the tiny teacher's, `psnr` is all that can be told.
        reference: as `clips`.
    """
    error = (clips - reference).square().mean((1, 2, 3, 4))
    told = {"psnr": float((-10 * error.clamp(min=1e-10).log10()).mean())}
    if not set(prompts) <= set(PROMPTS):
        return told
    right, theirs = ([_right(clip, p) for clip, p in zip(c, prompts, strict=True)] for c in (clips, reference))
    told["adherence"] = sum(reading is not None for reading in right) / len(right)

    fractions: dict[str, Callable[[Sequence[Reading | None]], float]] = {
        "spread_of_place": lambda r: math.hypot(_spread(r, prompts, "x"), _spread(r, prompts, "y")),
        "spread_of_size": lambda r: _spread(r, prompts, "half"),
        "speed_of_motion": lambda r: float(np.mean([one.speed for one in r if one] or [0.0])),
    }
    # Of a reference that shows nothing there is no fraction, nor would JSON have a number for it.
    return told | {name: of(right) / base for name, of in fractions.items() if (base := of(theirs))}


def _right(clip: Tensor, prompt: str) -> Reading | None:
    """What a clip shows, if that is its prompt."""
    reading = read(clip.transpose(0, 1))
    return reading if reading and reading.prompt == prompt else None


def _spread(readings: Sequence[Reading | None], prompts: Sequence[str], of: str) -> float:
    """The standard deviation of one attribute within a prompt, pooled over the prompts with at least two readings."""
    values: dict[str, list[float]] = {}
    for reading, prompt in zip(readings, prompts, strict=True):
        if reading:
            values.setdefault(prompt, []).append(getattr(reading, of))
    variances = [np.var(each, ddof=1) for each in values.values() if len(each) > 1]
    return math.sqrt(np.mean(variances)) if variances else 0.0


def counted(steps: int) -> str:
    """`4 steps`."""
    return f"{steps} step{'s' * (steps > 1)}"


def warm(seconds: Sequence[float]) -> float:
    """What all would have taken at the median of those after the first, which compiles."""
    return round(len(seconds) * float(np.median(seconds[1:] or seconds)), 1)


class Judge:
    """Samples the same prompts from the same seeds with whatever it is given.

    Args:
        teacher: the pipeline.
        data: has the embeddings.
        device: where to sample.
        dtype: in which precision.
    """

    def __init__(self, teacher: Teacher, data: Data, device: torch.device, dtype: torch.dtype) -> None:
        self.teacher, self.data, self.device, self.dtype = teacher, data, device, dtype
        prompts = sorted(set(data.which))
        self.readable = all(data.prompts[n] in PROMPTS for n in prompts)
        self.prompts = prompts if self.readable else prompts[:4]
        self.shown = [n for n in prompts if data.prompts[n] in SHOWN] or prompts[:4]
        seeds = SEEDS if self.readable else SEEDS[:1]
        self.plan = [(n, seed * 1_000 + n) for seed in seeds for n in self.prompts]

    def sample(self, arm: Arm) -> tuple[Tensor, dict[str, float]]:
        """Sample every prompt, from each seed where adherence can be read.

        Returns:
            The clips, (clips, frames, 3, height, width) from 0 to 1; and what they took each, warmed up: transformer
            blocks passed, seconds of denoising, seconds of decoding.
        """
        pipe = self.teacher.pipeline(self.device, self.dtype, **arm.students())
        if arm.euler:
            pipe.scheduler = few_steps(self.teacher.scheduler, arm.steps)
        size, spent, clips = self.data.args.train_batch_size, [0.0, 0.0], []
        batches = [self.plan[start : start + size] for start in range(0, len(self.plan), size)]
        for number, batch in enumerate([self.plan[:1], *batches]):
            prompts, seeds = zip(*batch, strict=True)
            marks = [time.perf_counter()]
            latents = sample(pipe, self.data, prompts, seeds, 1 if number == 0 else arm.steps, arm.scales)[:, -1]
            marks.append(self._now())
            made = decode(pipe.vae, latents).cpu()
            marks.append(self._now())
            if number:  # the first warms up
                clips.append(made)
                spent = [total + end - begin for total, begin, end in zip(spent, marks, marks[1:], strict=False)]
        count = len(self.plan)
        passes = arm.steps * arm.blocks * (2 if arm.scales["guidance_scale"] > 1 else 1)
        return torch.cat(clips), {"block_passes": passes, "seconds": spent[0] / count, "vae_seconds": spent[1] / count}

    def _now(self) -> float:
        """The time when the device has done all that it was given."""
        if self.device.type == "cuda":  # pragma: no cover - needs a GPU
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def validate(self, expert: Expert, student: WanTransformer3DModel, name: str) -> Path | None:
        """Sample `--validation_prompts` with an expert's student as it is, into `OUTPUT_DIR/validation`.

        The other expert is its own student, as the two will be used, and as the last stage that it has finished left
        it; only before the first such stage it is the teacher's. Where FSDP has the student in parts, all processes
        must ask, and draw the same: the other expert is spread over them, too.

        Returns:
            The video; None in all processes but the first.
        """
        args = self.data.args
        students = {expert.name: student.eval()}
        for other in self.teacher.experts:
            folder = args.output_dir / "checkpoints" / other.name
            left = [folder / stage for stage in stages(args) if (folder / stage / "student").exists()]
            if other != expert and left:
                students[other.name] = load_student(self.teacher, other, left[-1], self.dtype)
        if apart := is_sharded(student):
            for other in self.teacher.experts:
                if other != expert:
                    drawn = students.setdefault(other.name, self.teacher.expert(other, self.dtype))
                    spread(drawn.eval().requires_grad_(False).to(self.device))  # of several data types
        numbers = [self.data.prompts.index(prompt) for prompt in args.validation_prompts]
        pipe = self.teacher.pipeline(self.device, self.dtype, aside=False, **students)
        steps, scales = self.student_sampling()
        if args.student_steps:
            pipe.scheduler = few_steps(self.teacher.scheduler, steps)
        seeds = [SEEDS[0] * 1_000 + n for n in numbers]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=args.mixed_precision == "bf16"):
            latents = sample(pipe, self.data, numbers, seeds, steps, scales)[:, -1]
        film = None
        if is_main_process():
            (args.output_dir / "validation").mkdir(exist_ok=True)
            film = write_film([decode(pipe.vae, latents).cpu()], args.output_dir / "validation" / f"{name}.gif")
        student.train()
        if apart:  # what no backward pass follows stays together, as it was
            student.reshard()
        return film

    def student_sampling(self) -> tuple[int, dict[str, float]]:
        """Steps and guidance scales of the student; one that learnt the guided teacher needs no guidance of its own."""
        args = self.data.args
        if args.student_steps:
            return args.student_steps, NO_GUIDANCE
        return args.num_inference_steps, NO_GUIDANCE if args.guidance_scale > 1 else guidance(args)

    def arms(self, experts: Sequence[Expert]) -> dict[str, Arm]:
        """What is compared; the first is what the others are compared with."""
        args, blocks = self.data.args, self.teacher.transformer["num_layers"]
        many, guided = args.num_inference_steps, guidance(args)
        steps, scales = self.student_sampling()
        few = bool(args.student_steps)

        def untrained() -> dict[str, WanTransformer3DModel]:
            teachers = {e.name: self.teacher.expert(e, self.dtype) for e in experts}
            return {name: new_student(it, args.student_blocks, self.dtype) for name, it in teachers.items()}

        def after(stage: str) -> dict[str, WanTransformer3DModel]:
            work = args.output_dir / "checkpoints"
            return {e.name: load_student(self.teacher, e, work / e.name / stage, self.dtype) for e in experts}

        def trained() -> dict[str, WanTransformer3DModel]:
            place = args.output_dir / "student"
            if args.lora_rank:
                bases = {expert.name: self.teacher.expert(expert, self.dtype) for expert in experts}
                states = {n: WanPipeline.lora_state_dict(place, weight_name=file_name(n)) for n in bases}
                return {n: with_lora(base, states[n], "transformer") for n, base in bases.items()}
            names = [expert.name for expert in experts]
            return {n: WanTransformer3DModel.from_pretrained(place, subfolder=n, dtype=self.dtype) for n in names}

        arms = {f"teacher, {counted(many)}": Arm(many, guided, blocks, False)}
        if few and steps != many:
            arms[f"teacher, {counted(steps)}"] = Arm(steps, guided, blocks, True)
        arms[f"untrained, {counted(steps)}"] = Arm(steps, scales, args.student_blocks, few, untrained)
        for stage in stages(args)[:-1]:
            arms[f"{stage}, {counted(steps)}"] = Arm(steps, scales, args.student_blocks, few, partial(after, stage))
        arms[f"student, {counted(steps)}"] = Arm(steps, scales, args.student_blocks, few, trained)
        if not few and many > FEW:
            arms[f"student, {counted(FEW)}"] = Arm(FEW, scales, args.student_blocks, True, trained)
        return arms

    def report(self, experts: Sequence[Expert]) -> dict[str, Any]:
        """Compare teacher, student untrained and student; draws the pictures, prints a table.

        Args:
            experts: those that have a student in `OUTPUT_DIR/student`.

        Returns:
            What was measured, for `metrics.json`.
        """
        args, out = self.data.args, self.data.args.output_dir
        clips, metrics = {}, {}
        prompts = [self.data.prompts[n] for n, _ in self.plan]
        arms = self.arms(experts)
        first = next(iter(arms))
        for name, arm in tqdm(arms.items(), "samples"):
            clips[name], spent = self.sample(arm)
            metrics[name] = measure(clips[name], prompts, clips[first]) | spent
        metrics[first].pop("psnr")
        self.draw(clips, "samples")
        write_card(self.teacher, args, metrics, out)
        losses = {
            f"{expert.name}, {stage}": json.loads(
                (out / "checkpoints" / expert.name / stage / "losses.json").read_text()
            )
            for expert in experts
            for stage in stages(args)
        }
        draw_loss(losses, out / "loss.png")
        if args.show_broken_tie:
            broken = {"tie proven": clips[first]}
            for name, repair in (("tie broken", False), ("repaired", True)):
                judge = self.with_broken_tie(repair)
                broken[name], spent = judge.sample(arms[first])
                metrics[name] = measure(broken[name], prompts, clips[first]) | spent
            self.draw(broken, "broken_tie")
        print(table(metrics))
        seconds = [step["seconds"] for steps in losses.values() for step in steps]
        last = {name: steps[-1] for name, steps in losses.items()}
        told = {"training_seconds": round(sum(seconds), 1), "step_seconds": round(float(np.median(seconds)), 4)}
        lasted = {"paths" if args.student_steps else "latents": self.data.seconds}
        for name, steps in losses.items():
            lasted.setdefault(name.split(", ")[1], []).extend(step["seconds"] for step in steps)
        took = {what: {"seconds": round(sum(each), 1), "warm": warm(each)} for what, each in lasted.items() if each}
        return {"arms": metrics, "prompts": sorted(set(prompts)), "losses": last, **told, "took": took}

    def draw(self, clips: Mapping[str, Tensor], name: str) -> None:
        """Pictures of the shown clips of the first seed, still and moving."""
        rows = [self.prompts.index(n) for n in self.shown]
        shown = {arm: made[rows] for arm, made in clips.items()}
        out = self.data.args.output_dir
        draw_samples(shown, [self.data.prompts[n] for n in self.shown], out / f"{name}.png")
        write_film(list(shown.values()), out / f"{name}.gif")

    def with_broken_tie(self, repair: bool) -> "Judge":
        """One whose text encoder is as transformers 5.0 to 5.2 loaded it, repaired or not."""
        args, data = self.data.args, copy.copy(self.data)
        torch.manual_seed(args.seed)  # the untied embedding is newly initialised
        data.texts = list(
            self.teacher.embed(data.prompts, repair, args.max_sequence_length, self.device, self.dtype, broken=True)
        )
        return Judge(self.teacher, data, self.device, self.dtype)
