"""The user's training data: prompts in a file, clips in a folder."""

import csv
import json
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import torch
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
    with file.open(encoding="utf-8", newline="") as lines:
        try:
            rows: Iterable[dict[str, Any]] = (
                [json.loads(line) for line in lines if line.strip()]
                if file.suffix == ".jsonl"
                else list(csv.DictReader(lines))
            )
        except ValueError as error:
            fail(f"{file}: {error}")
    clips = []
    for number, row in enumerate(rows, 1):
        told = row if isinstance(row, dict) else {}
        name, text = told.get("file_name"), told.get(args.caption_column)
        if not (isinstance(name, str) and isinstance(text, str) and name and text):
            needs = f"needs file_name and {args.caption_column}, both texts"
            fail(f"{file}: row {number} {needs}; it is {json.dumps(row)[:80]}")
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
        prompts = [line.strip() for line in args.prompts_file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        fail(f"--prompts_file {args.prompts_file}: {getattr(error, 'strerror', None) or error}")
    if not prompts:
        fail(f"--prompts_file {args.prompts_file}: is empty")
    return prompts


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
            for number, frame in enumerate(file.iter()):
                while len(frames) < args.num_frames and round(len(frames) * rate / FPS) <= number:
                    frames.append(torch.from_numpy(frame[..., :3].copy()))
                if len(frames) == args.num_frames:
                    break
    except (OSError, ValueError, ImportError) as error:
        raise UselessClip(f"{path}: cannot be read: {str(error).splitlines()[0]}") from error
    if len(frames) < args.num_frames or frames[0].ndim != 3:
        raise UselessClip(
            f"{path}: has {len(frames)} colour frames at {FPS} a second, --num_frames is {args.num_frames}"
        )
    clip = torch.stack(frames).permute(0, 3, 1, 2).float() / 127.5 - 1
    scale = max(args.height / clip.shape[-2], args.width / clip.shape[-1])
    size = [max(side, round(was * scale)) for side, was in zip((args.height, args.width), clip.shape[-2:], strict=True)]
    clip = interpolate(clip, size=size, mode="bilinear", antialias=True)
    top, left = (size[0] - args.height) // 2, (size[1] - args.width) // 2
    return clip[..., top : top + args.height, left : left + args.width].transpose(0, 1)
