"""The user's training data: prompts in a file, clips in a folder."""

import csv
import json
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeGuard

import imageio.v3 as iio
import numpy as np
import torch
from imageio.plugins.pillow import PillowPlugin
from torch import Tensor
from torch.nn.functional import interpolate

from tiedquiet.distill.options import fail
from tiedquiet.distill.tiny.clips import PROMPTS

FPS = 16  # frames a second of what Wan was trained on


WAN_PROMPTS = Path(__file__).with_name("prompts.txt")  # made by prompts.py


def read_metadata(args: Namespace) -> list[tuple[Path, str]]:
    """The clips of `--train_data_dir` and their prompts, as the `datasets` folder convention has them.

    Raises:
        SystemExit: with status 2, after one line naming the file and the row.
    """
    folder = args.train_data_dir
    files = [folder / "metadata.jsonl", folder / "metadata.csv"]
    file = next((file for file in files if file.exists()), None)
    if file is None:
        fail(f"--train_data_dir {folder}: has neither metadata.jsonl nor metadata.csv")
    with file.open(encoding="utf-8-sig", newline="") as lines:  # spreadsheets begin a file with a mark
        try:
            rows: Iterable[dict[str, Any]] = (
                [json.loads(line) for line in lines if line.strip()]
                if file.suffix == ".jsonl"
                else list(csv.DictReader(lines, strict=True))
            )
        except (ValueError, csv.Error) as error:
            fail(f"{file}: {error}")
    clips = []
    for number, row in enumerate(rows, 1):
        told = row if isinstance(row, dict) else {}
        name, text = told.get("file_name"), told.get(args.caption_column)
        if not (is_text(name) and is_text(text)):
            needs = f"needs file_name and {args.caption_column}, both texts"
            fail(f"{file}: row {number} {needs}; it is {json.dumps(row)[:80]}")
        if None in told:  # what follows the last column
            fail(f"{file}: row {number} has more columns than names; a text with a comma goes in quotes: {text[:80]}")
        if not (folder / name).is_file():
            fail(f"{file}: row {number}: no file {folder / name}")
        clips.append((folder / name, text))
    if not clips:
        fail(f"{file}: has no rows")
    return clips


def read_prompts(args: Namespace) -> list[str]:
    """The prompts of `--prompts_file`, or those that ship: of the tiny teacher, or for a real one.

    Raises:
        SystemExit: with status 2, after one line, if there are none.
    """
    if args.prompts_file is None:
        return list(PROMPTS) if args.tiny else WAN_PROMPTS.read_text(encoding="utf-8").splitlines()
    try:
        lines = args.prompts_file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        fail(f"--prompts_file {args.prompts_file}: {getattr(error, 'strerror', None) or error}")
    if not (prompts := [line.strip() for line in lines if line.strip()]):
        fail(f"--prompts_file {args.prompts_file}: is empty")
    return prompts


def is_text(told: Any) -> TypeGuard[str]:
    """Whether it is a text that says something, of characters alone: JSON can spell halves of one."""
    return isinstance(told, str) and bool(told.strip()) and told == told.encode("utf-8", "ignore").decode()


class UselessClip(Exception):
    """A clip that cannot be read, or is too short."""


def read_clip(path: Path, args: Namespace) -> Tensor:
    """The first frames of a clip at `FPS`, scaled and cut to size: (3, frames, height, width), -1 to 1.

    Raises:
        UselessClip: after which the next one can be read.
    """
    frames: list[Tensor] = []
    try:
        with iio.imopen(path, "r") as file:
            told = file.metadata()
            # A gif gives the milliseconds per frame, a video the frames per second.
            rate = told.get("fps") or 1000 / (told.get("duration") or 1000 / FPS)
            # Photographs may lie on their side, and be of other colours; what has more bits, pillow would clip.
            eight_bits = isinstance(file, PillowPlugin) and told["mode"][0] not in "IF"
            how: dict[str, Any] = {"mode": "RGB", "rotate": True} if eight_bits else {}
            for number, frame in enumerate(file.iter(**how)):
                while len(frames) < args.num_frames and round(len(frames) * rate / FPS) <= number:
                    if frame.dtype != np.uint8 or frame.shape[2:] not in ((3,), (4,)):
                        raise ValueError(f"numbers of {frame.dtype} in the form {frame.shape} are no colours of 8 bits")
                    frames.append(torch.from_numpy(frame[..., :3].copy()))
                if len(frames) == args.num_frames:
                    break
    except Exception as error:  # a torn file ends its reader in any of them
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise UselessClip(f"{path}: cannot be read: {why}") from error
    if len(frames) < args.num_frames:
        raise UselessClip(f"{path}: has {len(frames)} frames at {FPS} a second, --num_frames is {args.num_frames}")
    clip = torch.stack(frames).permute(0, 3, 1, 2).float() / 127.5 - 1
    scale = max(args.height / clip.shape[-2], args.width / clip.shape[-1])
    size = [max(side, round(was * scale)) for side, was in zip((args.height, args.width), clip.shape[-2:], strict=True)]
    clip = interpolate(clip, size=size, mode="bilinear", antialias=True)
    top, left = (size[0] - args.height) // 2, (size[1] - args.width) // 2
    return clip[..., top : top + args.height, left : left + args.width].transpose(0, 1)
