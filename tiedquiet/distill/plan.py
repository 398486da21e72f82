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
from torch import Tensor

from tiedquiet.distill.data import Data
from tiedquiet.distill.lora import Adapter, lora
from tiedquiet.distill.options import fail, needs_paths, stages, steps_of
from tiedquiet.distill.pipeline import Expert, Teacher, compute_dtype, size
from tiedquiet.distill.speed import speed_up

KEPT = 12  # bytes a parameter that learns: itself and Adam's two moments, in float32
GRADIENT = 4


@dataclass(frozen=True)
class Block:
    """What one block of the teacher's shape takes for one batch, measured where the run will be and as it will run.

    Attributes:
        path: seconds forward while paths are sampled.
        forward: seconds forward, without gradients, in training.
        learning: seconds forward and backward, as student and critic run.
        activations: bytes at the most, of all blocks, while one learns; 0 on a CPU, where nobody counts them.
    """

    path: float
    forward: float
    learning: float
    activations: int


def measured(args: Namespace, teacher: Teacher, device: torch.device) -> Block:
    """Measure transformers of two blocks and of three, with random weights: each further block adds what the third did.

    They are set up as the run's own: compiled or not, computed again backward or not, whole or under an adapter. The
    first block may differ from all others: below adapters, no gradient has to flow through it.
    """
    told = [Trial(args, teacher, blocks, device).taken() for blocks in (2, 3)]
    if args.compile:
        torch.compiler.reset()  # what the run compiles is counted against a limit
    if device.type == "cuda":  # pragma: no cover - needs a GPU
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    count = teacher.transformer["num_layers"]
    path, forward, learning, asking, most = (
        two + (count - 2) * max(0, three - two) for two, three in zip(*told, strict=True)
    )
    return Block(path / count, forward / count, learning / count, int(max(asking, most)))


class Trial:
    """A transformer of a few blocks, as a run has it.

    Args:
        args: the settings.
        teacher: has the shape of all but the number of blocks.
        blocks: how many.
        device: where the run will be.
    """

    def __init__(self, args: Namespace, teacher: Teacher, blocks: int, device: torch.device) -> None:
        self.args, self.device, self.dtype = args, device, compute_dtype(args)
        self.config = {**teacher.transformer, "num_layers": blocks}
        self.x = torch.randn(args.train_batch_size, *teacher.latents(args), device=device)
        self.text = torch.randn(len(self.x), args.max_sequence_length, self.config["text_dim"], device=device)
        self.timesteps = torch.full((len(self.x),), 500.0, device=device)

    def model(self, dtype: torch.dtype) -> WanTransformer3DModel:
        """With weights of a type, but for those that Wan keeps in float32."""
        with self.device:
            model = WanTransformer3DModel.from_config(self.config)
        for name, parameter in model.named_parameters():
            if not any(kept in name for kept in model._keep_in_fp32_modules):
                parameter.data = parameter.data.to(dtype)
        return model

    def velocity(self, model: Any) -> Tensor:
        """As in training."""
        velocity: Tensor = model(self.x.to(self.dtype), self.timesteps, self.text.to(self.dtype), return_dict=False)[0]
        return velocity

    def taken(self) -> tuple[float, float, float, int, int]:
        """Seconds of a path's pass, of one in training, of one forward and backward; bytes of the latter, see `most`.

        The first number of bytes is that of the way forward alone, where blocks that are not compiled leave copies of
        the weights in the type that is computed in.
        """
        frozen: Any = self.model(self.dtype).eval().requires_grad_(False)
        speed_up([frozen], [], self.args)
        asked = frozen
        if self.args.lora_rank:
            asked = learner = Adapter(self.model(self.dtype), "student").add(self.args.lora_rank, 0)
            speed_up([], [asked.base], self.args)
        else:
            learner = self.model(torch.float32).train()
            speed_up([], [learner], self.args)

        @torch.no_grad()
        def ask(model: Any, mixed: bool) -> None:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=mixed):
                self.velocity(model)

        def loss() -> Tensor:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=mixed):
                return self.velocity(learner).float().square().mean()

        mixed = self.dtype == torch.bfloat16
        path = quickest(lambda: ask(frozen, False), self.device)
        forward = quickest(lambda: ask(asked, mixed), self.device) if self.args.lora_rank else path
        # Gradients stay, as between the two losses of a step.
        learning = quickest(lambda: loss().backward(), self.device)
        return path, forward, learning, most(loss, self.device), most(lambda: loss().backward(), self.device)


def most(act: Callable[[], object], device: torch.device) -> int:
    """Bytes on a GPU at the most while something is done, beyond what was there before."""
    used = 0
    if device.type == "cuda":  # pragma: no cover - needs a GPU
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        act()
        used = torch.cuda.max_memory_allocated(device) - before
    return used


def quickest(act: Callable[[], object], device: torch.device) -> float:
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


@dataclass(frozen=True)
class Plan:
    """What is known before any weight is loaded.

    Attributes:
        lines: for people, one for each thing.
        seconds: of the paths, and of each stage of all experts.
        memory: bytes of each GPU at the most, while something is learnt.
        disk: bytes at the most.
    """

    lines: list[str]
    seconds: dict[str, float]
    memory: int
    disk: int

    def told(self) -> dict[str, Any]:
        """For `metrics.json`, beside what was taken."""
        seconds = {name: round(spent, 1) for name, spent in self.seconds.items()}
        return {"seconds": seconds, "gib": round(self.memory / 2**30, 2), "gb": round(self.disk / 1e9, 2)}


def plan(
    args: Namespace, teacher: Teacher, trained: Sequence[Expert], data: Data, processes: int, device: torch.device
) -> Plan:
    """Say what a run would take.

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
    lines, seconds = [], {}
    if args.student_steps:
        own = {expert: data.nodes.of(expert) for expert in trained}
        taken = (
            f"{expert.name} takes {', '.join(f'{data.nodes.timesteps[k]:.0f}' for k in nodes)}"
            for expert, nodes in own.items()
        )
        lines.append(f"steps of the student, by their timesteps: {'; '.join(taken)}")
    lacking = len(data.lacking())
    if needs_paths(args) and not args.train_data_dir:
        passes = args.num_inference_steps * blocks * (2 if args.sample_guidance_scale > 1 else 1)
        what = "paths" if args.student_steps else "latents"
        seconds[what] = lacking / processes / batch * passes * block.path
        lines.append(
            f"{what} of {args.num_inference_steps} steps: {lacking:,} to make, {len(data.which) - lacking:,} to reuse; "
            f"{told_hours(seconds[what] / 3600)}, {lacking * data.bytes_each / 1e9:.2f} GB"
        )
    for stage in stages(args):
        steps = steps_of(args, stage)
        updates = steps * args.gradient_accumulation_steps
        seconds[stage] = 0.0
        for expert in trained:
            forward, learning = step_blocks(args, stage, blocks, data.nodes.of(expert))
            seconds[stage] += updates * (forward * block.forward + learning * block.learning)
        lines.append(
            f"{stage}: {steps:,} steps of {batch * processes} for each expert, {told_hours(seconds[stage] / 3600)}"
        )
    held = memory(args, config, len(trained), processes)
    lines.append(
        f"memory of each GPU: {(held + block.activations) / 2**30:.1f} GiB while it learns, "
        f"{held / 2**30:.1f} of weights, gradients and Adam's moments"
        + (f", {block.activations / 2**30:.1f} of activations" if block.activations else "")
    )
    needs = space(args, teacher, [expert.name for expert in trained], data)
    disk = sum(need for _, need in needs.values())
    each = " and ".join(f"{need / 1e9:.2f} in {flag}" for flag, (_, need) in needs.items())
    lines.append(f"disk: {disk / 1e9:.2f} GB, {each}")
    whole = told_hours(sum(seconds.values()) / 3600)
    lines.append(f"in all {whole} before the student is written, samples are drawn after that")
    return Plan(lines, seconds, held + block.activations, disk)


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


def memory(args: Namespace, config: dict[str, Any], experts: int = 1, processes: int = 1) -> int:
    """Bytes of weights, gradients and Adam's moments that a stage holds at the most, none of them spread over GPUs.

    - What learns has 12 bytes a parameter: itself and two moments, in float32. Student and critic learn in turns, and
      an optimizer that has stepped drops its gradients, so those of one of them are there at a time, 4 bytes each.
    - What is only asked is in the type that is computed in. That is the teacher, in every stage but that of segments;
      and, in the second stage of the second of two experts, the first one's student, which takes the steps before.
    - Adapters learn as a student does. All of them lie on one teacher, which is there in every stage.
    - DDP keeps the gradients of both, in the memory in which it exchanges them.

    Activations are not in it: those are measured, see `Trial`. A pass leaves for its way back what `--compile` and
    `--gradient_checkpointing` make of it, and while a block goes back, all in it is there once more.

    Args:
        args: the settings.
        config: of a transformer of the teacher.
        experts: how many are trained.
        processes: that share the work.
    """
    teacher, stored = parameters(config), 2 if args.mixed_precision == "bf16" else 4
    matching = "matching" in stages(args)
    student = parameters({**config, "num_layers": args.student_blocks})
    critic = teacher if matching else 0
    asked = 0 if stages(args) == ["segments"] and not args.lora_rank else stored * teacher
    if matching and experts > 1:
        asked += stored * (teacher if args.lora_rank else student)
    if args.lora_rank:
        student = adapter(args, config)
        critic = student if matching else 0
    wrapped = processes > 1 and not args.lora_rank
    gradients = student + critic if wrapped else max(student, critic)
    total: int = asked + KEPT * (student + critic) + GRADIENT * gradients + 4 * args.use_ema * student
    return total


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
    there = size(args.output_dir / "checkpoints")  # a run that continues has written a part of it
    return {
        "--output_dir": (args.output_dir, max(0, written - there)),
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
