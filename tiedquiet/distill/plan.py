"""The plan of a run, before it starts: steps of each expert, paths, hours, memory and disk."""

import shutil
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel

from tiedquiet.distill.data import Data
from tiedquiet.distill.lora import lora
from tiedquiet.distill.options import fail, needs_paths, stages, steps_of
from tiedquiet.distill.pipeline import Expert, Teacher, compute_dtype, size
from tiedquiet.distill.speed import speed_up

COMPILED = 0.66  # of the time of blocks that are not compiled: docs/distill.md
LEARNING = 16  # bytes a parameter: itself, its gradient and Adam's two moments, in float32


@dataclass(frozen=True)
class Block:
    """What one block of the teacher's shape takes for one batch, measured where the run will be.

    Attributes:
        forward: seconds, without gradients, in the teacher's precision.
        learning: seconds forward and backward, as student and critic run.
        kept: bytes that it leaves for the backward pass; 0 on a CPU, where nobody counts them.
    """

    forward: float
    learning: float
    kept: int


def measured(args: Namespace, teacher: Teacher, device: torch.device) -> Block:
    """Time transformers of one block and of two, with random weights; what is not in a block is spread over all."""
    dtype, x = compute_dtype(args), torch.randn(args.train_batch_size, *teacher.latents(args), device=device)
    text = torch.randn(len(x), args.max_sequence_length, teacher.transformer["text_dim"], device=device)
    timesteps = torch.full((len(x),), 500.0, device=device)
    told = []
    for blocks in (1, 2):
        model: Any = WanTransformer3DModel.from_config({**teacher.transformer, "num_layers": blocks}).to(device)
        model.train()
        speed_up([], [model], Namespace(**{**vars(args), "compile": False}))
        kept = 0

        def learn(model: Any = model) -> None:
            nonlocal kept
            before = allocated(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                out = model(x, timesteps, text, return_dict=False)[0]
            kept = allocated(device) - before
            out.float().square().mean().backward()
            model.zero_grad()

        def ask(model: Any = model) -> None:
            with torch.no_grad():
                model(x.to(dtype), timesteps, text.to(dtype), return_dict=False)

        learning = quickest(learn, device)
        for parameter in model.eval().parameters():
            parameter.data = parameter.data.to(dtype)
        told.append((quickest(ask, device), learning, kept))
    count, share = teacher.transformer["num_layers"], COMPILED if args.compile else 1.0
    forward, learning, kept = (one + (count - 1) * max(0, two - one) for one, two in zip(*told, strict=True))
    return Block(share * forward / count, share * learning / count, int(kept / count))


def allocated(device: torch.device) -> int:
    """Bytes on a GPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def quickest(act: Callable[[], None], device: torch.device) -> float:
    """Seconds, the least of three times after one that warms up."""
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        act()
        if device.type == "cuda":  # pragma: no cover - needs a GPU
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def parameters(config: dict[str, Any]) -> int:
    """Of a transformer of this configuration; none of them is made."""
    with init_empty_weights():
        return int(WanTransformer3DModel.from_config(config).num_parameters())


def step_blocks(args: Namespace, stage: str, blocks: int, own: Sequence[int]) -> tuple[float, float]:
    """Blocks that one update passes forward alone, and forward and backward.

    Args:
        args: the settings.
        stage: which.
        blocks: of the teacher.
        own: the nodes of the expert.
    """
    mine = args.student_blocks
    if stage == "velocity":
        return blocks * (2 if args.guidance_scale > 1 else 1), mine
    if stage == "segments":
        return 0, mine
    first = own[0] if args.expert == "low" else 0
    states = sum(node - first for node in own) / len(own)  # steps of the student to a state of its own
    learnt = mine * (2 if args.segment_weight else 1) + args.critic_steps * blocks
    return states * mine + 3 * blocks, learnt  # the guided teacher asks twice, the critic once


def plan(
    args: Namespace, teacher: Teacher, trained: Sequence[Expert], data: Data, processes: int, device: torch.device
) -> list[str]:
    """What is known before any weight is loaded, a line for each thing.

    Args:
        args: the settings.
        teacher: the pipeline.
        trained: those of its experts that get a student.
        data: knows what its caches lack.
        processes: that share the work.
        device: where the run will be; some blocks are timed there.
    """
    block, config = measured(args, teacher, device), teacher.transformer
    blocks, batch = config["num_layers"], args.train_batch_size
    lines = []
    if args.student_steps:
        own = {expert: data.nodes.of(expert) for expert in trained}
        taken = (
            f"{expert.name} takes {', '.join(f'{data.nodes.timesteps[k]:.0f}' for k in nodes)}"
            for expert, nodes in own.items()
        )
        lines.append(f"steps of the student, by their timesteps: {'; '.join(taken)}")
    lacking, hours = len(data.lacking()), 0.0
    if needs_paths(args) and not args.train_data_dir:
        passes = args.num_inference_steps * blocks * (2 if args.sample_guidance_scale > 1 else 1)
        hours = lacking / processes / batch * passes * block.forward / 3600
        what = f"{'paths' if args.student_steps else 'latents'} of {args.num_inference_steps} steps"
        lines.append(
            f"{what}: {lacking:,} to make, {len(data.which) - lacking:,} to reuse; {told_hours(hours)}, "
            f"{lacking * data.bytes_each / 1e9:.2f} GB"
        )
    for stage in stages(args):
        steps = steps_of(args, stage)
        updates = steps * args.gradient_accumulation_steps
        spent = 0.0
        for expert in trained:
            forward, learning = step_blocks(args, stage, blocks, data.nodes.of(expert))
            spent += updates * (forward * block.forward + learning * block.learning) / 3600
        hours += spent
        lines.append(f"{stage}: {steps:,} steps of {batch * processes} for each expert, {told_hours(spent)}")
    held = memory(args, config)
    lines.append(
        f"memory of each GPU: {held / 2**30:.1f} GiB of weights, gradients and Adam's moments"
        + (f", {block.kept * blocks / 2**30:.1f} GiB of activations" if block.kept else "")
    )
    needs = space(args, teacher, [expert.name for expert in trained], data)
    each = " and ".join(f"{need / 1e9:.2f} in {flag}" for flag, (_, need) in needs.items())
    lines.append(f"disk: {sum(need for _, need in needs.values()) / 1e9:.2f} GB, {each}")
    return [*lines, f"in all {told_hours(hours)} before the student is written, samples are drawn after that"]


def told_hours(hours: float) -> str:
    """In words."""
    minutes = round(60 * hours)
    if hours >= 1:
        return f"{hours:.1f} hours"
    return f"{minutes} minute{'s' * (minutes > 1)}" if minutes else "under a minute"


def adapter(args: Namespace, config: dict[str, Any]) -> int:
    """Parameters of one adapter on a transformer of this configuration."""
    with init_empty_weights():
        model = WanTransformer3DModel.from_config(config)
    model.add_adapter(lora(args.lora_rank), "student")
    return int(model.num_parameters()) - parameters(config)


def memory(args: Namespace, config: dict[str, Any]) -> int:
    """Bytes of what a stage holds at the most, not spread over GPUs: what learns, and what is only asked."""
    teacher, student = parameters(config), parameters({**config, "num_layers": args.student_blocks})
    stored = 2 if args.mixed_precision == "bf16" else 4
    if args.lora_rank:
        both = 2 if "matching" in stages(args) else 1
        return stored * teacher * both + both * LEARNING * adapter(args, config)
    learning: int = LEARNING * student + 4 * args.use_ema * student
    if "matching" in stages(args):  # the critic is as large as the teacher; Wan2.2's other student takes its steps
        learning += (LEARNING + stored) * teacher
    return learning + (0 if stages(args) == ["segments"] else stored * teacher)


def space(args: Namespace, teacher: Teacher, experts: list[str], data: Data) -> dict[str, tuple[Path, int]]:
    """The folders that the settings name, and the bytes that each has to hold at the most.

    Args:
        args: the settings.
        teacher: with `--standalone` everything but the trained experts is copied from there; nothing is for adapters.
        experts: the names of those that are trained.
        data: knows what its caches lack.
    """
    # Kept in float32 in the stages' folders; a checkpoint has Adam's two moments as well, and in the
    # second stage the critic and its own. While one is written, the oldest over the limit is still there.
    if args.lora_rank:
        copied, student = False, 4 * adapter(args, teacher.transformer)
        critic = student
    else:
        copied = args.standalone
        student = 4 * parameters({**teacher.transformer, "num_layers": args.student_blocks})
        critic = 4 * parameters(teacher.transformer)
    states = [3 * (student + (critic if stage == "matching" else 0)) for stage in stages(args)]
    kept = args.checkpoints_total_limit * sum(states) if args.checkpointing_steps else 0
    written = len(experts) * (len(stages(args)) * student + kept + max(states))
    written += len(experts) * student // (2 if args.student_dtype == "bfloat16" else 1)
    if copied:
        written += sum(size(teacher.folder / name) for name in teacher.parts if name not in experts)
    return {
        "--output_dir": (args.output_dir, written),
        "--cache_dir": (args.cache_dir, len(data.lacking()) * data.bytes_each),
    }


def check_space(args: Namespace, teacher: Teacher, experts: list[str], data: Data) -> None:
    """Stop where a disk cannot hold the student, its checkpoints and what is cached: what `space` says.

    Raises:
        SystemExit: with status 2, after one line.
    """
    disks: dict[int, int] = {}
    for flag, (folder, need) in space(args, teacher, experts, data).items():
        there = next(path for path in [folder.absolute(), *folder.absolute().parents] if path.is_dir())
        free = shutil.disk_usage(there).free
        disks[there.stat().st_dev] = disks.get(there.stat().st_dev, 0) + need
        if (total := disks[there.stat().st_dev]) > free:
            fail(f"{flag} {folder}: needs about {total / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
