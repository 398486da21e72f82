"""Clips of a coloured shape that moves: drawn for the tiny teacher to learn, and read back from pixels to judge it.

    'a red circle moving left'  ->  draw  ->  a clip  ->  read  ->  'a red circle moving left'

Reading is plain arithmetic, so prompt adherence is a fact about the pixels and not the opinion of another model.
"""

import math
from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

SIZE, FRAMES = 64, 9  # pixels, frames
COLOURS = {"red": (1.0, 0.1, 0.1), "green": (0.1, 0.9, 0.1), "blue": (0.2, 0.3, 1.0), "yellow": (1.0, 0.9, 0.1)}
# Part of its bounding box that a shape fills: pi r^2 / (2 r)^2, all of it, half of it.
SHAPES = {"circle": math.pi / 4, "square": 1.0, "triangle": 0.5}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # x, y; y grows downwards
PROMPTS = [
    f"a {colour} {shape} moving {direction}" for colour, shape, direction in product(COLOURS, SHAPES, DIRECTIONS)
]


def draw(which: Tensor, generator: torch.Generator, smallest: float = 12, spread: float = 5) -> Tensor:
    """Draw one clip for each index into `PROMPTS`; size, speed and place are random.

    Args:
        which: (batch,) indices, on the device that shall draw.
        generator: of that device.
        smallest: half the least height of a shape, in pixels; the largest has 13.
        spread: how far from the middle, in pixels, the middle of a path may lie; up to 8 the whole path stays inside.

    Returns:
        (batch, 3, FRAMES, SIZE, SIZE), values from -1 to 1 as the VAE wants them.
    """
    device = which.device
    colour, shape, direction = (
        which // (len(SHAPES) * len(DIRECTIONS)),
        which // len(DIRECTIONS) % len(SHAPES),
        which % len(DIRECTIONS),
    )

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(which), generator=generator, device=device)

    half, speed = uniform(smallest, 13), uniform(2, 2.75)  # pixels, pixels per frame
    step = torch.tensor(list(DIRECTIONS.values()), device=device)[direction] * speed[:, None]
    time = torch.arange(FRAMES, device=device) - (FRAMES - 1) / 2
    middle = SIZE / 2 + torch.stack([uniform(-spread, spread), uniform(-spread, spread)], 1)
    centre = middle[:, None] + step[:, None] * time[None, :, None]  # (batch, frames, 2)

    grid = torch.arange(SIZE, device=device) + 0.5
    x = grid[None, None, None, :] - centre[..., 0, None, None]
    y = grid[None, None, :, None] - centre[..., 1, None, None]
    r = half[:, None, None, None]
    # Distances to the edge in pixels, negative inside, so that edges are antialiased.
    circle = (x * x + y * y).sqrt() - r
    square = torch.maximum(x.abs(), y.abs()) - r
    triangle = torch.maximum((2 * x.abs() - y - r) / math.sqrt(5), y - r)
    edge = torch.stack([t.expand(-1, -1, SIZE, SIZE) for t in (circle, square, triangle)])
    inside = (0.5 - edge[shape, torch.arange(len(which), device=device)]).clamp(0, 1)
    paint = torch.tensor(list(COLOURS.values()), device=device)[colour]
    return 2 * inside[:, None] * paint[:, :, None, None, None] - 1


def read(clip: Tensor) -> str | None:
    """Read back what a clip shows.

    Args:
        clip: (3, frames, height, width), values from 0 to 1.

    Returns:
        The prompt it adheres to, or None where there is no single coloured thing that moves.
    """
    clip = clip.float()
    lit = clip.amax(0) > 0.5  # (frames, height, width)
    if (lit.sum((1, 2)) < 30).any():
        return None
    pixels = clip[:, lit].mean(1)
    colour = min(COLOURS, key=lambda name: float((pixels - torch.tensor(COLOURS[name])).square().sum()))

    fills, centres = [], []
    for frame in lit:
        ys, xs = frame.nonzero(as_tuple=True)
        # Rows and columns with one stray pixel do not stretch the box.
        rows, columns = ((frame.sum(axis) > 1).nonzero() for axis in (1, 0))
        if not len(rows) or not len(columns):
            return None
        box = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
        fills.append(float(frame.sum() / box))
        centres.append((float(xs.float().mean()), float(ys.float().mean())))
    fill = sorted(fills)[len(fills) // 2]
    shape = min(SHAPES, key=lambda name: abs(SHAPES[name] - fill))

    dx, dy = (centres[-1][axis] - centres[0][axis] for axis in (0, 1))
    if max(abs(dx), abs(dy)) < clip.shape[-1] / 16:
        return None
    direction = max(DIRECTIONS, key=lambda name: DIRECTIONS[name][0] * dx + DIRECTIONS[name][1] * dy)
    return f"a {colour} {shape} moving {direction}"


def adhering(clips: Tensor, prompts: Sequence[str]) -> int:
    """How many clips, (clips, frames, 3, height, width) from 0 to 1, read back as their prompts."""
    return sum(read(clip.transpose(0, 1)) == prompt for clip, prompt in zip(clips.cpu(), prompts, strict=True))
