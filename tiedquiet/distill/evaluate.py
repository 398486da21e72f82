"""What came of it: measures that are arithmetic on pixels, and the pictures."""

import copy
import json
import math
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import matplotlib
import numpy as np
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor
from tqdm import tqdm

from tiedquiet.distill.data import Data, decode, sample
from tiedquiet.distill.lora import file_name, with_lora
from tiedquiet.distill.options import beside, stages, write_text
from tiedquiet.distill.pipeline import NO_GUIDANCE, Expert, Teacher, few_steps, guidance, load_student, new_student
from tiedquiet.distill.tiny.clips import PROMPTS, Reading, read

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SEEDS = (1_000, 1_001, 1_002, 1_003)  # of the clips that are judged
FEW = 4  # at which a student that learnt the velocity is judged as well
SHOWN = {  # in the pictures: every colour, shape and direction
    "a red circle moving left",
    "a green square moving up",
    "a blue triangle moving right",
    "a yellow circle moving down",
}
GIF_LIMIT = 4_000_000  # bytes; what is larger is written as mp4
PARTS = {  # of loss.png
    "loss": "black", "velocity": "tab:blue", "task": "tab:orange",
    "matching": "black", "segments": "tab:blue", "critic": "tab:red",
}  # fmt: skip
COLUMNS = {  # of the table, and how each is shown
    "adherence": "{:.1%}",
    "psnr": "{:.1f} dB",
    "spread_of_place": "{:.2f}",
    "spread_of_size": "{:.2f}",
    "speed_of_motion": "{:.2f}",
    "block_passes": "{:.0f}",
    "seconds": "{:.3f}",
    "vae_seconds": "{:.3f}",
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
      prompts, as a part of the reference's: a pipeline that forgot some of what a prompt can mean has less than 1.
    - `speed_of_motion`: the mean, as a part of the reference's.

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

    def ratio(of: Callable[[Sequence[Reading | None]], float]) -> float:
        ours, base = of(right), of(theirs)
        return ours / base if base else math.nan

    told["spread_of_place"] = ratio(lambda r: math.hypot(_spread(r, prompts, "x"), _spread(r, prompts, "y")))
    told["spread_of_size"] = ratio(lambda r: _spread(r, prompts, "half"))
    told["speed_of_motion"] = ratio(lambda r: float(np.mean([one.speed for one in r if one] or [0.0])))
    return told


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

    def validate(self, expert: Expert, student: WanTransformer3DModel, name: str) -> None:
        """Sample `--validation_prompts` with an expert's student as it is, into `OUTPUT_DIR/validation`.

        The other expert is its finished student where there is one, as the two will be used.
        """
        args = self.data.args
        students = {expert.name: student.eval()}
        for other in self.teacher.experts:
            place = args.output_dir / "checkpoints" / other.name / stages(args)[-1]
            if other != expert and (place / "student").exists():
                students[other.name] = load_student(self.teacher, other, place, self.dtype)
        numbers = [self.data.prompts.index(prompt) for prompt in args.validation_prompts]
        pipe = self.teacher.pipeline(self.device, self.dtype, **students)
        steps, scales = self.student_sampling()
        if args.student_steps:
            pipe.scheduler = few_steps(self.teacher.scheduler, steps)
        seeds = [SEEDS[0] * 1_000 + n for n in numbers]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=args.mixed_precision == "bf16"):
            latents = sample(pipe, self.data, numbers, seeds, steps, scales)[:, -1]
        (args.output_dir / "validation").mkdir(exist_ok=True)
        write_film([decode(pipe.vae, latents).cpu()], args.output_dir / "validation" / f"{name}.gif")
        student.train()

    def student_sampling(self) -> tuple[int, dict[str, float]]:
        """Steps and guidance scales of the student; one that learnt the guided teacher needs no guidance of its own."""
        args = self.data.args
        if args.student_steps:
            return args.student_steps, NO_GUIDANCE
        return args.num_inference_steps, NO_GUIDANCE if args.guidance_scale > 1 else guidance(args)

    def arms(self, experts: Sequence[Expert]) -> dict[str, Arm]:
        """What is compared; the first is what the others are held against."""
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
                return {n: with_lora(base, place / file_name(n), "transformer") for n, base in bases.items()}
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
        return {"arms": metrics, "prompts": sorted(set(prompts)), "losses": last, **told}

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


def table(metrics: Mapping[str, Mapping[str, float]]) -> str:
    """The measures, a line for each arm; Markdown, so that it can be put into a report as it is."""
    used = [column for column in COLUMNS if any(column in measured for measured in metrics.values())]
    rows = [["", *(column.replace("_", " ") for column in used)]]
    rows += [[arm, *(COLUMNS[c].format(of[c]) if c in of else "" for c in used)] for arm, of in metrics.items()]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = [
        f"| {arm:{widths[0]}} | {' | '.join(f'{cell:>{w}}' for cell, w in zip(cells, widths[1:], strict=True))} |"
        for arm, *cells in rows
    ]
    rule = f"| {'-' * widths[0]} | {' | '.join('-' * (width - 1) + ':' for width in widths[1:])} |"
    return "\n".join([lines[0], rule, *lines[1:]])


LOAD_LORA = """pipe = WanPipeline.from_pretrained("{teacher}")
pipe.scheduler = UniPCMultistepScheduler.from_pretrained("this folder", subfolder="scheduler")
pipe.load_lora_weights("this folder")"""


def write_card(teacher: Teacher, args: Any, metrics: Mapping[str, Mapping[str, float]], out: Path) -> None:
    """Write the student's model card, README.md, in the hub's form, with its pictures beside it."""
    call = f"prompt, height={args.height}, width={args.width}, num_frames={args.num_frames}"
    if args.max_sequence_length != 512:  # the pipeline's own; padded otherwise, a prompt is another one to the student
        call += f", max_sequence_length={args.max_sequence_length}"
    if args.student_steps:
        call += f", num_inference_steps={args.student_steps}"
    scales = NO_GUIDANCE if args.student_steps or args.guidance_scale > 1 else guidance(args)
    call += "".join(f", {name}={scale}" for name, scale in scales.items())
    hidden = {"resume_from_checkpoint", "show_broken_tie", "tiny", *(["pretrained_model_name_or_path"] * args.tiny)}
    told = {k: v for k, v in vars(args).items() if k not in hidden and v not in (None, [], False, "")}
    base = "" if args.tiny else f"base_model: {args.pretrained_model_name_or_path}\n"
    pictures = [path for path in sorted(out.glob("samples.*")) if path.suffix in (".png", ".gif")]
    settings = "\n".join(f"{name}: {value}" for name, value in sorted(told.items()) if not isinstance(value, Path))
    for picture in pictures:
        (out / "student" / picture.name).write_bytes(picture.read_bytes())
    shown = "\n\n".join(f"![{' | '.join(metrics)}]({picture.name})" for picture in pictures)
    pipe = 'pipe = WanPipeline.from_pretrained("this folder")'
    imports = "UniPCMultistepScheduler, " if args.lora_rank else ""
    of_blocks = f"{args.student_blocks} of the teacher's {teacher.transformer['num_layers']} blocks"
    if args.lora_rank:
        pipe = LOAD_LORA.format(teacher="its teacher" if args.tiny else args.pretrained_model_name_or_path)
        if file := next((out / "student").glob("transformer_2_*"), None):
            pipe += f'\npipe.load_lora_weights("this folder", weight_name="{file.name}", load_into_transformer_2=True)'
        of_blocks = f"An adapter of rank {args.lora_rank}"
    card = f"""---
library_name: diffusers
pipeline_tag: text-to-video
tags:
- text-to-video
- distillation
{base}---

# A student of {Path(args.pretrained_model_name_or_path).name if not args.tiny else "the tiny Wan teacher of tiedquiet"}

{of_blocks}, distilled with `tiedquiet.distill`.

```python
from diffusers import {imports}WanPipeline

{pipe}
frames = pipe({call}).frames
```

{table(metrics)}

PSNR is to the first line's clip from the same seed; spread and speed are parts of the first line's; seconds are of one
clip, denoising and decoding apart.

{shown}

Settings:

```
{settings}
```
"""
    write_text(out / "student" / "README.md", card)


def draw_samples(columns: Mapping[str, Tensor], captions: Sequence[str], path: Path) -> None:
    """First, middle and last frame of every clip, a column of three for each of `columns`."""
    frames = next(iter(columns.values())).shape[1]
    chosen = sorted({0, frames // 2, frames - 1})
    labels = [textwrap.fill(caption, 24) for caption in captions]
    height = max(1.2, *(0.13 * len(label.splitlines()) for label in labels))  # inches that the longest prompt needs
    figure, axes = plt.subplots(
        len(labels),
        len(columns) * len(chosen),
        figsize=(1.2 * len(columns) * len(chosen) + 1.6, height * len(labels) + 0.6),
        squeeze=False,
    )
    for row, label in enumerate(labels):
        for column, (name, clips) in enumerate(columns.items()):
            for place, frame in enumerate(chosen):
                axis = axes[row][column * len(chosen) + place]
                axis.imshow(clips[row, frame].permute(1, 2, 0).clamp(0, 1).numpy())
                axis.set(xticks=[], yticks=[])
                if row == 0 and place == len(chosen) // 2:
                    axis.set_title(textwrap.fill(name, 14 * len(chosen)), fontsize=9)
        axes[row][0].set_ylabel(label, fontsize=7, rotation=0, ha="right", va="center")
    figure.tight_layout()
    save(figure, path)


def draw_loss(losses: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> None:
    """The loss and its parts, step by step, one panel for each expert."""
    figure, axes = plt.subplots(1, len(losses), figsize=(5 * len(losses), 3.2), squeeze=False)
    for axis, (name, steps) in zip(axes[0], losses.items(), strict=True):
        parts = [name for name in PARTS if name in steps[0]]
        for part in parts if len(parts) > 2 else parts[:1]:  # a loss of one term is that term
            values = [step[part] for step in steps]
            axis.plot(range(1, len(steps) + 1), values, label=part, color=PARTS[part], lw=1)
        axis.set(title=name, xlabel="step", ylabel="mean squared error", yscale="log")
        axis.legend(fontsize=8)
    figure.tight_layout()
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Write a picture, complete or not at all."""
    with beside(path) as part:
        figure.savefig(part, dpi=110)
    plt.close(figure)


def write_film(columns: Sequence[Tensor], path: Path, fps: int = 6) -> Path:
    """The clips, a row for each of `columns`, as an animation; as mp4 where a gif would be over `GIF_LIMIT`.

    Returns:
        Where it was written.
    """
    rows = [torch.cat([*clips.clamp(0, 1)], dim=-1) for clips in columns]  # side by side: (frames, 3, height, width)
    frames = (torch.cat(rows, dim=-2).permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
    zoom = max(1, math.ceil(96 / columns[0].shape[-2]))
    frames = np.repeat(np.repeat(frames, zoom, 1), zoom, 2)
    # Told from one frame: a gif of full size takes minutes only to be found too large.
    large = len(frames) * len(iio.imwrite("<bytes>", frames[len(frames) // 2], extension=".gif")) > GIF_LIMIT
    if large:
        path = path.with_suffix(".mp4")
    with beside(path) as part:
        if large:
            iio.imwrite(part, frames, extension=".mp4", fps=16, macro_block_size=1)
        else:
            iio.imwrite(part, frames, extension=".gif", duration=1000 / fps, loop=0)
    return path
