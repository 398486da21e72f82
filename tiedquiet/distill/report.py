"""What a run shows of its clips and metrics: the table, pictures, videos."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import matplotlib
import numpy as np
import torch
from torch import Tensor

from tiedquiet.distill.options import beside

matplotlib.use("Agg")
from matplotlib import pyplot as plt

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


def table(metrics: Mapping[str, Mapping[str, float]]) -> str:
    """The metrics, a line for each arm; Markdown, so that it can be pasted into a report as it is."""
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


def draw_samples(columns: Mapping[str, Tensor], captions: Sequence[str], path: Path) -> None:
    """First, middle and last frame of every clip, a column of three for each of `columns`."""
    frames = next(iter(columns.values())).shape[1]
    chosen = sorted({0, frames // 2, frames - 1})
    labels = [textwrap.fill(caption, 18) for caption in captions]
    # Inches: as wide as a page shows it with letters that can be read, and as high as the longest prompt needs.
    width = min(1.2, 7.8 / (len(columns) * len(chosen)))
    height = max(width, *(0.15 * len(label.splitlines()) for label in labels))
    figure, axes = plt.subplots(
        len(labels),
        len(columns) * len(chosen),
        figsize=(width * len(columns) * len(chosen) + 1.4, height * len(labels) + 0.6),
        squeeze=False,
    )
    for row, label in enumerate(labels):
        for column, (name, clips) in enumerate(columns.items()):
            for place, frame in enumerate(chosen):
                axis = axes[row][column * len(chosen) + place]
                axis.imshow(clips[row, frame].permute(1, 2, 0).clamp(0, 1).numpy())
                axis.set(xticks=[], yticks=[])
                if row == 0 and place == len(chosen) // 2:
                    axis.set_title(textwrap.fill(name, round(12 * width * len(chosen))), fontsize=9)
        # A prompt may have dollars in it.
        axes[row][0].set_ylabel(label, fontsize=8, rotation=0, ha="right", va="center", parse_math=False)
    figure.tight_layout(pad=0.5, w_pad=0.2, h_pad=0.3)
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
        figure.savefig(part, dpi=160)
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
    if large := gif_size(frames) > GIF_LIMIT:
        path = path.with_suffix(".mp4")
    with beside(path) as part:
        if large:
            iio.imwrite(part, frames, extension=".mp4", fps=16, macro_block_size=1)
        else:
            part.write_bytes(as_gif(frames, fps))
    return path


def gif_size(frames: np.ndarray) -> int:
    """Bytes of a gif, told from one frame: one of full size takes minutes only to be found too large."""
    return len(frames) * len(as_gif(frames[len(frames) // 2 :][:1], 1))


def as_gif(frames: np.ndarray, fps: float) -> bytes:
    """(frames, height, width, 3) as an animation."""
    return bytes(iio.imwrite("<bytes>", frames, extension=".gif", duration=1000 / fps, loop=0))


def track_film(trackers: Sequence[Any], film: Path, name: str, step: int) -> None:
    """Show a film where accelerate's tracker can show one: tensorboard and wandb.

    Args:
        trackers: of the accelerator.
        film: as `write_film` wrote it.
        name: the title.
        step: when.
    """
    for tracker in trackers:
        if tracker.name == "tensorboard":
            from tensorboard.compat.proto.summary_pb2 import Summary

            with iio.imopen(film, "r") as file:
                frames = np.stack(list(file.iter()))
            while film.suffix != ".gif" and gif_size(frames) > GIF_LIMIT:  # tensorboard shows nothing else that moves
                frames = frames[:, ::2, ::2]
            told = film.read_bytes() if film.suffix == ".gif" else as_gif(frames, 16)
            height, width = frames.shape[1:3]
            image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=told)
            tracker.writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)
        elif tracker.name == "wandb":  # pragma: no cover - a package that the tests do without
            import wandb

            tracker.log({name: wandb.Video(str(film), format=film.suffix[1:])}, step=step)
