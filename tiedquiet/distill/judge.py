"""What came of it: prompt adherence where it can be read, and the pictures."""

import copy
import json
import math
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import matplotlib
import numpy as np
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor
from tqdm import tqdm

from tiedquiet.distill.cache import Data, sample
from tiedquiet.distill.clips import PROMPTS, adhering
from tiedquiet.distill.student import new_student
from tiedquiet.distill.teacher import Expert, Teacher

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SEEDS = (1_000, 1_001, 1_002, 1_003)  # of the clips that are judged
SHOWN = {  # in the pictures: every colour, shape and direction
    "a red circle moving left",
    "a green square moving up",
    "a blue triangle moving right",
    "a yellow circle moving down",
}


def student_guidance(args: Namespace) -> float:
    """A student that learnt the guided teacher needs no guidance of its own."""
    return 1.0 if args.guidance_scale > 1 else float(args.sample_guidance_scale)


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

    def sample(self, guidance: float, **students: WanTransformer3DModel) -> tuple[Tensor, dict[str, float]]:
        """Sample every prompt, from each seed where adherence can be read.

        Args:
            guidance: the scale of classifier-free guidance.
            students: take the place of the experts that they are named after.

        Returns:
            The shown clips of the first seed, (clips, frames, 3, height, width) from 0 to 1; and what was measured: the
            share of clips that read back as their prompt, and the seconds that a clip takes.
        """
        pipe = self.teacher.pipeline(self.device, self.dtype, **students)
        size, right, count = self.data.args.train_batch_size, 0, 0
        shown: dict[int, Tensor] = {}
        start = time.perf_counter()
        for seed in SEEDS if self.readable else SEEDS[:1]:
            for first in range(0, len(self.prompts), size):
                numbers = self.prompts[first : first + size]
                clips = (
                    sample(pipe, self.data, numbers, [seed * 1_000 + n for n in numbers], "pt", guidance).float().cpu()
                )
                count += len(clips)
                if self.readable:
                    right += adhering(clips, [self.data.prompts[n] for n in numbers])
                if seed == SEEDS[0]:
                    shown |= {n: clip for n, clip in zip(numbers, clips, strict=True) if n in self.shown}
        measured = {"seconds_per_clip": (time.perf_counter() - start) / count}
        if self.readable:
            measured = {"adherence": right / count, "clips": count, **measured}
        return torch.stack([shown[n] for n in self.shown]), measured

    def validate(self, name: str, student: WanTransformer3DModel, step: int) -> None:
        """Sample `--validation_prompts` with the student as it is, into `OUTPUT_DIR/validation`."""
        args = self.data.args
        numbers = [self.data.prompts.index(prompt) for prompt in args.validation_prompts]
        pipe = self.teacher.pipeline(self.device, self.dtype, **{name: student.eval()})
        seeds = [SEEDS[0] * 1_000 + n for n in numbers]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=args.mixed_precision == "bf16"):
            clips = sample(pipe, self.data, numbers, seeds, "pt", student_guidance(args))
        (args.output_dir / "validation").mkdir(exist_ok=True)
        write_gif([clips.float().cpu()], args.output_dir / "validation" / f"{name}-{step}.gif")
        student.train()

    def report(self, experts: Sequence[Expert]) -> dict[str, Any]:
        """Compare teacher, student before and student after; draws the pictures, prints a table.

        Args:
            experts: those that have a student in `OUTPUT_DIR/student`.

        Returns:
            What was measured, for `metrics.json`.
        """
        args, out = self.data.args, self.data.args.output_dir
        names = [expert.name for expert in experts]
        arms: dict[str, tuple[float, Callable[[], dict[str, WanTransformer3DModel]]]] = {
            "teacher": (args.sample_guidance_scale, dict),
            "student before": (
                student_guidance(args),
                lambda: {
                    e.name: new_student(self.teacher.expert(e, self.dtype), args.student_blocks, self.dtype)
                    for e in experts
                },
            ),
            "student after": (
                student_guidance(args),
                lambda: {
                    n: WanTransformer3DModel.from_pretrained(out / "student", subfolder=n, dtype=self.dtype)
                    for n in names
                },
            ),
        }
        columns, metrics = {}, {}
        for arm, (guidance, students) in tqdm(arms.items(), "samples"):
            columns[arm], metrics[arm] = self.sample(guidance, **students())
        draw_samples(columns, self.captions(), out / "samples.png")
        write_gif(list(columns.values()), out / "samples.gif")
        losses = {name: json.loads((out / "checkpoints" / name / "losses.json").read_text()) for name in names}
        draw_loss(losses, out / "loss.png")
        if args.show_broken_tie:
            columns = {"tie proven": columns["teacher"]}
            for arm, repair in (("tie broken", False), ("repaired", True)):
                columns[arm], metrics[arm] = self.with_broken_tie(repair)
            draw_samples(columns, self.captions(), out / "broken_tie.png")
        for arm, measured in metrics.items():
            print(f"{arm:>14}: " + ", ".join(f"{name} {value:.3g}" for name, value in measured.items()))
        return {**metrics, "losses": {name: steps[-1] for name, steps in losses.items()}}

    def with_broken_tie(self, repair: bool) -> tuple[Tensor, dict[str, float]]:
        """Sample the teacher with the text encoder as transformers 5.0 to 5.2 loaded it, repaired or not."""
        args, data = self.data.args, copy.copy(self.data)
        torch.manual_seed(args.seed)  # the untied embedding is newly initialised
        data.texts = list(
            self.teacher.embed(data.prompts, repair, args.max_sequence_length, self.device, self.dtype, broken=True)
        )
        return Judge(self.teacher, data, self.device, self.dtype).sample(args.sample_guidance_scale)

    def captions(self) -> list[str]:
        """The prompts of the shown clips."""
        return [self.data.prompts[n] for n in self.shown]


def draw_samples(columns: Mapping[str, Tensor], captions: Sequence[str], path: Path) -> None:
    """First, middle and last frame of every clip, a column of three for each of `columns`."""
    frames = next(iter(columns.values())).shape[1]
    chosen = sorted({0, frames // 2, frames - 1})
    figure, axes = plt.subplots(
        len(captions),
        len(columns) * len(chosen),
        figsize=(1.35 * len(columns) * len(chosen), 1.6 * len(captions)),
        squeeze=False,
    )
    for row, caption in enumerate(captions):
        for column, (name, clips) in enumerate(columns.items()):
            for place, frame in enumerate(chosen):
                axis = axes[row][column * len(chosen) + place]
                axis.imshow(clips[row, frame].permute(1, 2, 0).clamp(0, 1).numpy())
                axis.set(xticks=[], yticks=[])
                if place == len(chosen) // 2:
                    axis.set_title(f"{name}\n{caption}" if row == 0 else caption, fontsize=8)
    figure.tight_layout()
    save(figure, path)


def draw_loss(losses: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> None:
    """The loss and its parts, step by step, one panel for each expert."""
    figure, axes = plt.subplots(1, len(losses), figsize=(5 * len(losses), 3.2), squeeze=False)
    for axis, (name, steps) in zip(axes[0], losses.items(), strict=True):
        for part in steps[0].keys() - {"lr", "seconds"}:
            axis.plot(range(1, len(steps) + 1), [step[part] for step in steps], label=part, lw=1)
        axis.set(title=name, xlabel="step", yscale="log")
        axis.legend(fontsize=8)
    figure.tight_layout()
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Write a picture beside its place and move it there."""
    part = path.with_name(f".part-{path.name}")
    figure.savefig(part, dpi=110)
    plt.close(figure)
    part.replace(path)


def write_gif(columns: Sequence[Tensor], path: Path, fps: int = 6) -> None:
    """The clips, a row for each of `columns`, as an animation."""
    rows = [torch.cat([*clips.clamp(0, 1)], dim=-1) for clips in columns]  # side by side: (frames, 3, height, width)
    frames = (torch.cat(rows, dim=-2).permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
    zoom = max(1, math.ceil(128 / columns[0].shape[-2]))
    part = path.with_name(f".part-{path.name}")
    iio.imwrite(part, np.repeat(np.repeat(frames, zoom, 1), zoom, 2), extension=".gif", duration=1000 / fps, loop=0)
    part.replace(path)
