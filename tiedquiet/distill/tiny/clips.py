"""Clips of a coloured shape that moves: drawn for the tiny teacher to learn, and read back from pixels to judge it.

    'a red circle moving left'  ->  draw  ->  a clip  ->  read  ->  'a red circle moving left', where, how large

Where the shape is, how large and how fast, the prompt does not say: the mean over all clips of a prompt is a blur, and
that is what a model draws in too few steps. Reading is plain arithmetic, so every metric is a fact about the pixels and
not the opinion of another model.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

SIZE, FRAMES = 64, 5  # pixels, frames
COLOURS = {"red": (1.0, 0.1, 0.1), "green": (0.1, 0.9, 0.1), "blue": (0.2, 0.3, 1.0), "yellow": (1.0, 0.9, 0.1)}
# Part of its bounding box that a shape fills: pi r^2 / (2 r)^2, all of it, half of it.
SHAPES = {"circle": math.pi / 4, "square": 1.0, "triangle": 0.5}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # x, y; y grows downwards
PROMPTS = [
    f"a {colour} {shape} moving {direction}" for colour, shape, direction in product(COLOURS, SHAPES, DIRECTIONS)
]
HALF = (8.0, 14.0)  # half the height of a shape, pixels
SPEED = (2.5, 6.0)  # pixels per frame
CLEAR = 0.7  # overlap with the ideal shape under which nothing is recognised


def distances(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Distances in pixels to the edge of each of `SHAPES`, negative inside.

    Args:
        x: how far to the right of the middle of the shape's box, any shape.
        y: how far below it.
        r: half the height of the box; the three are broadcast together.

    Returns:
        (shapes, *broadcast shape).
    """
    circle = (x * x + y * y).sqrt() - r
    square = torch.maximum(x.abs(), y.abs()) - r
    triangle = torch.maximum((2 * x.abs() - y - r) / math.sqrt(5), y - r)  # stands on its base
    return torch.stack([circle, square, triangle.expand_as(circle)])


def draw(which: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one clip for each index into `PROMPTS`; size, speed and place are uniform, the whole path is in the picture.

    Args:
        which: (batch,) indices, on the device that shall draw.
        generator: of that device.

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

    half, speed = uniform(*HALF), uniform(*SPEED)
    step = torch.tensor(list(DIRECTIONS.values()), device=device)[direction] * speed[:, None]
    time = torch.arange(FRAMES, device=device) - (FRAMES - 1) / 2
    room = SIZE / 2 - 1 - half[:, None] - step.abs() * time[-1]
    middle = SIZE / 2 + room * torch.stack([uniform(-1, 1), uniform(-1, 1)], 1)
    centre = middle[:, None] + step[:, None] * time[None, :, None]  # (batch, frames, 2)

    grid = torch.arange(SIZE, device=device) + 0.5
    x = grid[None, None, None, :] - centre[..., 0, None, None]
    y = grid[None, None, :, None] - centre[..., 1, None, None]
    edge = distances(x, y, half[:, None, None, None])[shape, torch.arange(len(which), device=device)]
    paint = torch.tensor(list(COLOURS.values()), device=device)[colour]
    inside = (0.5 - edge).clamp(0, 1)  # so that edges are antialiased
    return 2 * inside[:, None] * paint[:, :, None, None, None] - 1


@dataclass(frozen=True)
class Reading:
    """What a clip shows.

    Attributes:
        prompt: the prompt that it adheres to.
        x: of the shape's centre of mass in the middle of its path, pixels from the left.
        y: the same from the top.
        half: half its height, pixels.
        speed: pixels per frame, from the first frame to the last.
    """

    prompt: str
    x: float
    y: float
    half: float
    speed: float


def read(clip: Tensor) -> Reading | None:
    """Read back what a clip shows.

    The shape is the one that, drawn with the lit pixels' own centre of mass and area, overlaps them best.

    Args:
        clip: (3, frames, height, width), values from 0 to 1.

    Returns:
        The reading, or None where there is no single, clear, coloured shape that moves.
    """
    clip = clip.float()
    lit = clip.amax(0) > 0.5  # (frames, height, width)
    area = lit.sum((1, 2)).float()
    if (area < 30).any():
        return None
    pixels = clip[:, lit].mean(1)
    colour = min(COLOURS, key=lambda name: float((pixels - torch.tensor(COLOURS[name])).square().sum()))

    ys, xs = (torch.arange(side) + 0.5 for side in lit.shape[1:])
    x, y = (lit.sum(1) * xs).sum(1) / area, (lit.sum(2) * ys).sum(1) / area
    fill = torch.tensor(list(SHAPES.values()))[:, None, None, None]
    half = (area[:, None, None] / fill).sqrt() / 2  # (shapes, frames, 1, 1)
    # A triangle's centre of mass lies a third of that below the middle of its box.
    rise = torch.tensor([1 / 3 if name == "triangle" else 0.0 for name in SHAPES])[:, None, None, None] * half
    right, below = xs - x[:, None, None], ys[:, None] - y[:, None, None]
    ideal = torch.stack([distances(right, below + rise[n], half[n])[n] for n in range(len(SHAPES))]) < 0
    overlap = ((ideal & lit).sum((2, 3)) / (ideal | lit).sum((2, 3))).mean(1)
    best = int(overlap.argmax())
    if overlap[best] < CLEAR:
        return None

    dx, dy = float(x[-1] - x[0]), float(y[-1] - y[0])
    if max(abs(dx), abs(dy)) < clip.shape[-1] / 16:
        return None
    direction = max(DIRECTIONS, key=lambda name: DIRECTIONS[name][0] * dx + DIRECTIONS[name][1] * dy)
    return Reading(
        f"a {colour} {list(SHAPES)[best]} moving {direction}",
        float(x.mean()),
        float(y.mean()),
        float(half[best].mean()),
        math.hypot(dx, dy) / (len(lit) - 1),
    )


def adhering(clips: Tensor, prompts: Sequence[str]) -> int:
    """How many clips, (clips, frames, 3, height, width) from 0 to 1, read back as their prompts."""
    readings = [read(clip.transpose(0, 1)) for clip in clips.cpu()]
    return sum(
        reading is not None and reading.prompt == prompt for reading, prompt in zip(readings, prompts, strict=True)
    )
