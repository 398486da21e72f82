"""The student: fewer blocks, begun from the teacher's, and written as a pipeline folder of its own."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import UniPCMultistepScheduler, WanTransformer3DModel
from torch import Tensor

from tiedquiet.distill.options import fail
from tiedquiet.distill.teacher import Teacher


def groups(teacher_blocks: int, student_blocks: int) -> list[range]:
    """The consecutive teacher blocks that each student block stands for: begun as the first, taught by the last."""
    edges = [teacher_blocks * n // student_blocks for n in range(student_blocks + 1)]
    return [range(start, end) for start, end in pairwise(edges)]


def new_student(teacher: WanTransformer3DModel, blocks: int, dtype: torch.dtype) -> WanTransformer3DModel:
    """A transformer of `blocks` blocks with the teacher's weights, where they are; float32 where those are float32."""
    first = [group[0] for group in groups(len(teacher.blocks), blocks)]
    begun = {}
    for source, theirs in teacher.state_dict().items():
        name = source
        if source.startswith("blocks."):
            number, rest = source.removeprefix("blocks.").split(".", 1)
            if int(number) not in first:
                continue
            name = f"blocks.{first.index(int(number))}.{rest}"
        begun[name] = theirs.detach().to(dtype if theirs.dtype != torch.float32 else torch.float32, copy=True)
    return assembled({**teacher.config, "num_layers": blocks}, begun).to(teacher.device)


def assembled(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> WanTransformer3DModel:
    """A transformer of exactly these weights; none are drawn only to be thrown away."""
    with init_empty_weights():
        model = WanTransformer3DModel.from_config(dict(config))
    model.load_state_dict(state, assign=True)
    return model


def save_weights(config: Mapping[str, Any], state: Mapping[str, Tensor], place: Path) -> None:
    """Write an expert's folder beside its place and move it there. FSDP's models have parts: `state` is the whole."""
    with tempfile.TemporaryDirectory(prefix=".part-", dir=place.parent) as beside:
        assembled(config, state).save_pretrained(Path(beside) / place.name)
        (Path(beside) / place.name).replace(place)


def few_steps(config: Mapping[str, Any], steps: int, order: int = 1) -> UniPCMultistepScheduler:
    """The scheduler with which plain `WanPipeline` takes exactly the steps that a student was trained for.

    UniPC of order 1 without its corrector is Euler's method, and its sigmas, s u / (1 + (s - 1) u) for u = 1, 1 - 1/n,
    ..., 1/n, are every k-th of those that a teacher with k n steps takes. `FlowMatchEulerDiscreteScheduler` would space
    them differently, and waste its last step (https://github.com/huggingface/diffusers/issues/13243).

    Args:
        config: of the teacher's scheduler; its `flow_shift`, or `shift`, is s.
        steps: n.
        order: of the solver; 2, with its corrector, is how a teacher is sampled at its own many steps.
    """
    return UniPCMultistepScheduler(
        num_train_timesteps=config.get("num_train_timesteps", 1000),
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=config.get("flow_shift", config.get("shift", 1.0)),
        solver_order=order,
        disable_corrector=list(range(steps)) if order == 1 else [],
    )


def size(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def check_space(teacher: Teacher, experts: list[str], share: float, output_dir: Path, checkpoints: int) -> None:
    """Stop where the disk cannot hold the student: its parts of the teacher, and weights in float32 with checkpoints.

    Args:
        teacher: everything but the trained experts is copied from there.
        experts: the names of those that are trained.
        share: of their blocks that the student has.
        output_dir: where it is written.
        checkpoints: how many are kept of each expert, the one being written included.

    Raises:
        SystemExit: with status 2, after one line.
    """
    copied = sum(size(teacher.folder / name) for name in teacher.parts if name not in experts)
    # Stored in 16 bits as Wan is, kept in 32; a checkpoint has Adam's two moments as well.
    trained = sum(2 * share * size(teacher.folder / name) for name in experts)
    need = int(copied + 2 * trained + 3 * checkpoints * trained)
    there = next(parent for parent in [output_dir.absolute(), *output_dir.absolute().parents] if parent.is_dir())
    free = shutil.disk_usage(there).free
    if need > free:
        fail(f"--output_dir {output_dir}: needs about {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")


def write_pipeline(teacher: Teacher, trained: Mapping[str, Path], target: Path, steps: int = 0) -> None:
    """Write the whole pipeline beside `target` and move it into place, so that there is never half a student.

    Its text encoder is the teacher's, with a config that says that its embedding is tied: the tie was proven before the
    first embedding was made, and transformers 5.0 to 5.2 would leave it untied otherwise.

    Args:
        teacher: everything but the experts comes from there.
        trained: the folders of the trained experts, by the names of the teacher's; others are copied.
        target: the folder to make.
        steps: how many the student was trained for; its scheduler takes them. 0 keeps the teacher's scheduler.

    Raises:
        FileExistsError: `target` is there already; nothing is written.
    """
    if target.exists():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    with tempfile.TemporaryDirectory(prefix=".part-", dir=target.parent) as beside:
        made = Path(beside) / target.name
        made.mkdir()
        index = dict(teacher.index)
        for name in teacher.parts:
            shutil.copytree(trained.get(name, teacher.folder / name), made / name)
        if steps:
            few_steps(teacher.scheduler, steps).save_pretrained(made / "scheduler")
            index["scheduler"] = ["diffusers", "UniPCMultistepScheduler"]
        (made / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
        config = made / "text_encoder" / "config.json"
        told = json.loads(config.read_text())
        if told.get("tie_word_embeddings") is False:
            config.write_text(json.dumps({**told, "tie_word_embeddings": True}, indent=2) + "\n")
        made.rename(target)
