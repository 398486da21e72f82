"""One distillation step of the example, arm beside arm: seconds, tokens, useful arithmetic, memory.

    python benchmarks/distill_step.py                     # one GPU: Wan2.1-T2V-1.3B shape, 480x832x81 frames
    python benchmarks/distill_step.py --scaling           # one and two GPUs: DDP and FSDP through accelerate
    python benchmarks/distill_step.py --shape tiny --device cpu --rounds 2

A teacher of 30 blocks in bf16 and a student of 15 kept in float32, computed in bf16, with random weights, batch 1,
AdamW: the step of `tiedquiet.distill.train`, from noisy latents to updated weights. `segments` is the step of a student
of few steps: it learns from cached paths, and the teacher has no part in it; the other arms ask the teacher for its
velocity. All arms share one process and one pair of models and take turns in rotating order; the ceiling, a large bf16
matrix product, is measured in every round. Only the arithmetic that the step needs is counted (teacher forward; student
forward and twice that backward), so computing something again counts against an arm. Before the first step, what an arm
computes, the teacher's velocity and the student's gradients, is held against that of uncompiled blocks. After it, it is
counted how many weights it moved, and how many it would have moved if the student were kept in bf16.
"""

import argparse
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
from argparse import Namespace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.record import PAGE_INCHES, arguments, show, spread, stop, write

# heads, blocks of teacher and student, feed-forward, text width; latent frames, height, width; text tokens
SHAPES: dict[str, dict[str, int]] = {
    "wan2.1-1.3b": {"heads": 12, "blocks": 30, "ffn": 8960, "text": 4096, "f": 21, "h": 60, "w": 104, "tokens": 512},
    "wan2.2-a14b": {"heads": 40, "blocks": 40, "ffn": 13824, "text": 4096, "f": 21, "h": 60, "w": 104, "tokens": 512},
    "tiny": {"heads": 1, "blocks": 4, "ffn": 64, "text": 32, "f": 2, "h": 8, "w": 8, "tokens": 8},
}
# What each arm passes to the example.
LEAN = {"compile": True, "gradient_checkpointing": "attention"}
ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointing": {"gradient_checkpointing": "blocks"},
    "compiled": {"compile": True},
    "compiled, checkpointing": {"compile": True, "gradient_checkpointing": "blocks"},
    "compiled, checkpointing but attention": LEAN,
    "compiled, checkpointing but attention, float8 teacher": {**LEAN, "teacher_attention": "float8"},
    "compiled, float8 teacher": {"compile": True, "teacher_attention": "float8"},
    "segments: checkpointing": {"gradient_checkpointing": "blocks", "student_steps": 4},
    "segments: compiled": {"compile": True, "student_steps": 4},
    "segments: compiled, checkpointing but attention": {**LEAN, "student_steps": 4},
}
# What --scaling measures: of the velocity the fastest in little memory, of segments what docs/example.md recommends.
SCALED = [
    "compiled, checkpointing but attention, float8 teacher",
    "segments: compiled, checkpointing but attention",
]
# What gradients are held against: as plain, in less memory.
REFERENCE = {False: "checkpointing", True: "segments: checkpointing"}
HEAD, PATCH, CHANNELS = 128, (1, 2, 2), 16


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--shape", default="wan2.1-1.3b", help=f"one of {', '.join(SHAPES)} (default: %(default)s)")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps for each arm (default: %(default)s)")
    parser.add_argument("--arms", nargs="+", help="which of them (default: all; with --scaling, one of each kind)")
    parser.add_argument("--student-blocks", type=int, help="of the student (default: half the teacher's)")
    parser.add_argument("--memory-limit", type=float, help="GiB that torch may hold; an arm that needs more says so")
    parser.add_argument("--scaling", action="store_true", help="the arms on one GPU and on more")
    parser.add_argument(
        "--kinds", nargs="+", choices=["one", "ddp", "fsdp"], default=["one", "ddp", "fsdp"], help="with --scaling"
    )
    parser.add_argument("--processes", type=int, default=2, help="of ddp and fsdp (default: %(default)s)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.shape not in SHAPES:
        stop(f"no shape {options.shape!r}; there are {', '.join(SHAPES)}")
    options.arms = options.arms or (SCALED if options.scaling else list(ARMS))
    if unknown := [arm for arm in options.arms if arm not in ARMS]:
        stop(f"no arm {unknown[0]!r}; there are {'; '.join(ARMS)}")
    if options.rounds < 1:
        stop("at least one round")
    blocks = SHAPES[options.shape]["blocks"]
    options.student_blocks = options.student_blocks or blocks // 2
    if not 1 <= options.student_blocks <= blocks:
        stop(f"--student-blocks {options.student_blocks}: the teacher has {blocks}")
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: falling back to the CPU, whose figures say nothing about a GPU", file=sys.stderr)
        options.device = "cpu"
    if options.worker:
        scaling_worker(options)
    elif options.scaling:
        scaling(options)
    else:
        one_device(options)


def segments(arm: str) -> bool:
    """Whether an arm learns from cached paths."""
    return "student_steps" in ARMS[arm]


def useful_flops(shape: dict[str, int], student_blocks: int, teacher: bool) -> float:
    """Multiplications and additions that one step needs, with the teacher's forward pass or without.

    A block: self-attention's four projections and its two products over all pairs of tokens; cross-attention's two
    projections over the latents and its two over the text, and its products; the two layers of the feed-forward part.
    """
    tokens, dim, text = latent_tokens(shape), HEAD * shape["heads"], shape["tokens"]
    linear = 2 * tokens * (4 * dim * dim + 2 * dim * dim + 2 * dim * shape["ffn"]) + 2 * text * 2 * dim * dim
    block = linear + 4 * tokens * tokens * dim + 4 * tokens * text * dim
    return float(block * (teacher * shape["blocks"] + 3 * student_blocks))


def latent_tokens(shape: dict[str, int]) -> int:
    return shape["f"] * shape["h"] // PATCH[1] * (shape["w"] // PATCH[2])


def settings(arm: dict[str, Any]) -> Namespace:
    """The example's own settings for such a run."""
    from tiedquiet.distill.options import parse

    args = parse("", ["--pretrained_model_name_or_path", "none", "--student_steps", "0", "--task_weight", "0.05"])
    vars(args).update(arm)
    return args


def wan_transformer(shape: dict[str, int]) -> Any:
    """One of `SHAPES` with random weights, of torch's default type and on its default device."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        num_attention_heads=shape["heads"],
        attention_head_dim=HEAD,
        ffn_dim=shape["ffn"],
        num_layers=shape["blocks"],
        text_dim=shape["text"],
    )


def models(shape: dict[str, int], device: Any, dtype: str, student_blocks: int | None = None) -> tuple[Any, Any]:
    """Teacher and student with random weights; the teacher in bf16 except for what Wan keeps in float32.

    Args:
        shape: of the teacher.
        device: where they are.
        dtype: of the student.
        student_blocks: half the teacher's if it is None.
    """
    import torch
    from diffusers import WanTransformer3DModel

    from tiedquiet.distill.pipeline import new_student

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        teacher = wan_transformer(shape)
    torch.set_default_dtype(torch.float32)
    # As they begin, gates let almost nothing through and attention is nearly flat: what attention in 8 bits gets wrong
    # would not reach the velocity.
    for block in teacher.blocks:
        torch.nn.init.normal_(block.scale_shift_table)
        torch.nn.init.uniform_(block.attn1.norm_q.weight, 0, 4)
    for name, parameter in teacher.named_parameters():
        if any(kept in name for kept in WanTransformer3DModel._keep_in_fp32_modules):
            parameter.data = parameter.data.float()
    teacher.eval().requires_grad_(False)
    return teacher, new_student(teacher, student_blocks or shape["blocks"] // 2, getattr(torch, dtype)).train()


class Steps:
    """Teacher, student and optimizer, and the step of each arm over them.

    Args:
        shape: of the models and the latents.
        device: where they are.
        student_blocks: half the teacher's if it is None.
    """

    def __init__(self, shape: dict[str, int], device: Any, student_blocks: int | None = None) -> None:
        import torch

        from tiedquiet.distill.pipeline import Expert
        from tiedquiet.distill.train import Distillation

        self.device = torch.device(device)
        self.teacher, self.student = models(shape, self.device, "float32", student_blocks)
        expert = Expert("transformer", 0.0, 1000.0, 1000, 3.0)
        self.distillation = Distillation(settings({}), self.teacher, self.student, expert)
        fused = True if self.device.type == "cuda" else None
        self.optimizer: Any = torch.optim.AdamW(self.student.parameters(), lr=1e-5, fused=fused)
        self.size = (1, CHANNELS, shape["f"], shape["h"], shape["w"])
        self.text = torch.randn(1, shape["tokens"], shape["text"], device=self.device)
        self.blocks: list[Any] = [*self.teacher.blocks, *self.student.blocks]
        self.segments = False  # until an arm is chosen
        self.untouched, self.chosen = self.taken(), dict[str, list[tuple[Any, ...]]]()
        # More is compiled here than in any run: several arms, one after the other, of the same code.
        torch._dynamo.config.recompile_limit = 100

    def choose(self, arm: str) -> None:
        """Set teacher and student up as an arm has them; what was compiled for it serves all its rounds."""
        from tiedquiet.distill.speed import speed_up

        if arm not in self.chosen:
            self.put(self.untouched)
            speed_up([self.teacher], [self.student], settings(ARMS[arm]))
            self.chosen[arm] = self.taken()
        self.put(self.chosen[arm])
        self.segments = segments(arm)
        self.teacher.to("cpu" if self.segments else self.device)  # as in the example

    def taken(self) -> list[tuple[Any, ...]]:
        """All that `speed_up` changes, block by block."""
        return [(block._compiled_call_impl, block.forward, block.attn1.processor) for block in self.blocks]

    def put(self, taken: list[tuple[Any, ...]]) -> None:
        for block, (compiled, forward, processor) in zip(self.blocks, taken, strict=True):
            block._compiled_call_impl, block.forward = compiled, forward
            block.attn1.set_processor(processor)

    def inputs(self) -> dict[str, Any]:
        import torch

        from tiedquiet.distill.train import send

        generator = torch.Generator().manual_seed(0)
        drawn = self.distillation.noisy(torch.randn(self.size, generator=generator), generator)
        return {name: send(tensor, self.device) for name, tensor in drawn.items()}

    def loss(self, inputs: dict[str, Any]) -> Any:
        """Computed as the example does, under accelerate's autocast."""
        import torch

        if self.segments:  # what is learnt is some velocity; which one, a step's time does not depend on
            inputs = {"target" if name == "task" else name: tensor for name, tensor in inputs.items()}
        with torch.autocast(self.device.type, torch.bfloat16), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Mismatch dtype")  # on CPUs, where layer norm is not fused then
            return self.distillation.loss(**inputs, text=self.text)[0]

    def __call__(self, inputs: dict[str, Any]) -> tuple[float, dict[str, Any]]:
        """One step; returns its loss and the next step's inputs, which the example, too, prepares meanwhile."""
        import torch

        from tiedquiet.distill.speed import whole

        loss = self.loss(inputs)
        loss.backward()
        ahead = self.inputs()
        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        value, size = loss.item(), whole(norm).item()
        if not math.isfinite(value + size):
            stop(f"loss {value}, norm of its gradient {size}: the time of such a step says nothing")
        return value, ahead

    def computed(self, arm: str) -> tuple[Any, dict[str, Any]]:
        """The teacher's velocity, where it is asked for, and the student's gradients as an arm computes them."""
        import torch

        self.choose(arm)
        inputs, dtype, velocity = self.inputs(), self.distillation.dtype, None
        if not self.segments:
            with torch.no_grad():
                x, text = inputs["x"].to(dtype), self.text.to(dtype)
                velocity = self.teacher(x, inputs["timesteps"], text, return_dict=False)[0].float()
        self.loss(inputs).backward()
        gradients = {
            name: parameter.grad.float().cpu()
            for name, parameter in self.student.named_parameters()
            # The same for all of a query's logits, which softmax does not see: what is there is rounding.
            if parameter.grad is not None and not name.endswith("to_k.bias")
        }
        self.optimizer.zero_grad()
        return velocity, gradients

    def moved(self, arm: str) -> dict[str, float]:
        """The part of the student's weights that one step moves, and would move if they were kept in bf16."""
        self.choose(arm)
        before = [parameter.detach().clone() for parameter in self.student.parameters()]
        self(self.inputs())
        count, told = 0, {"float32": 0, "bfloat16": 0}
        for old, parameter in zip(before, self.student.parameters(), strict=True):
            now = parameter.detach()
            rounded = old.bfloat16()
            count += old.numel()
            told["float32"] += int((now != old).sum())
            # An optimizer of bf16 weights adds the update to them and rounds the sum.
            told["bfloat16"] += int(((rounded.float() + (now - old)).bfloat16() != rounded).sum())
        return {name: number / count for name, number in told.items()}


def one_device(options: Any) -> None:
    """Measure every arm on one device and write the results."""
    import torch
    from tqdm import tqdm

    cuda = options.device == "cuda"
    total = torch.cuda.get_device_properties(0).total_memory / 2**30 if cuda else 0.0
    if cuda and options.memory_limit:
        torch.cuda.set_per_process_memory_fraction(options.memory_limit / total)
    shape = SHAPES[options.shape]
    steps = Steps(shape, options.device, options.student_blocks)
    inputs, failed, rounds, losses, errors = steps.inputs(), {}, [], {}, {}
    ceilings = [ceiling(options.device)]
    references = {kind: steps.computed(REFERENCE[kind]) for kind in sorted({segments(arm) for arm in options.arms})}
    moved: dict[str, float] = {}
    with tqdm(total=len(options.arms) * (options.rounds + 1), unit="step") as bar:
        # The first compares, while there is much to learn: once there is not, gradients are little but rounding.
        for number in range(options.rounds + 1):
            measured = {}
            for arm in options.arms[number % len(options.arms) :] + options.arms[: number % len(options.arms)]:
                bar.update()
                if arm in failed:
                    continue
                try:
                    if number == 0:
                        its_velocity, its_gradients = steps.computed(arm)
                        velocity, gradients = references[segments(arm)]
                        errors[arm] = {"gradient_error": gradient_error(its_gradients, gradients)}
                        if velocity is not None:
                            off = (its_velocity - velocity).norm() / velocity.norm()
                            errors[arm]["teacher_error"] = off.item()
                    else:
                        steps.choose(arm)
                        measured[arm], inputs, losses[arm] = timed(steps, inputs, cuda, warm=2 if number == 1 else 1)
                except ImportError as error:
                    failed[arm] = f"no module {error.name}"
                except torch.OutOfMemoryError:
                    failed[arm] = f"needs more than {options.memory_limit or total:.0f} GiB"
                    steps.optimizer.zero_grad()
                    gc.collect()
            ceilings.append(ceiling(options.device))
            if number:
                rounds.append(measured)
            else:
                moved = steps.moved(REFERENCE[segments(options.arms[0])])

    top = max(ceilings)
    arms: dict[str, Any] = {}
    finished = [arm for arm in options.arms if arm not in failed]
    for arm in finished:
        seconds = spread([measured[arm]["seconds"] for measured in rounds])
        flops = useful_flops(shape, options.student_blocks, teacher=not segments(arm))
        arms[arm] = {
            "seconds": seconds,
            "useful_teraflop": flops / 1e12,
            "tokens_per_s": latent_tokens(shape) / seconds["median"],
            "percent_of_ceiling": 100 * flops / seconds["median"] / top,
            "ratio_to_first": spread([m[arm]["seconds"] / m[finished[0]]["seconds"] for m in rounds]),
            "peak_gib": max(measured[arm]["peak_gib"] for measured in rounds),
            "loss": losses[arm],
            **errors[arm],
        }
    results = {
        "weights_moved_by_one_step": moved,
        "ceiling_teraflop_per_s": {"highest": top / 1e12, "all": [value / 1e12 for value in ceilings]},
        "arms": arms,
        "failed": failed,
        "rounds": rounds,
    }
    limit = "" if options.student_blocks == shape["blocks"] // 2 else f"-{options.student_blocks}-blocks"
    limit += f"-{options.memory_limit:g}gib" if options.memory_limit else ""
    configuration = {**vars(options), "out": None, "model": shape, "example": {arm: ARMS[arm] for arm in options.arms}}
    path = write(f"distill-step-{options.shape}{limit}", configuration, results, options.out)
    report(results)
    if arms:
        plot(path, results, options.shape)
    print(path)


def gradient_error(ours: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """The relative error of a kind of parameter's gradients, all blocks together: that of the worst kind."""
    off, size = dict[str, float](), dict[str, float]()
    for name, gradient in reference.items():
        kind = ".".join(part for part in name.split(".") if not part.isdigit())
        off[kind] = off.get(kind, 0.0) + (ours[name] - gradient).double().square().sum().item()
        size[kind] = size.get(kind, 0.0) + gradient.double().square().sum().item()
    errors = {kind: math.sqrt(off[kind] / size[kind]) for kind in size}
    worst = max(errors, key=lambda kind: math.inf if math.isnan(errors[kind]) else errors[kind])
    return {"of": worst, "error": errors[worst]}


def timed(
    steps: Steps, inputs: dict[str, Any], cuda: bool, warm: int
) -> tuple[dict[str, float], dict[str, Any], float]:
    """One step, after some that are not timed: another arm's memory and caches went before."""
    import torch

    for _ in range(warm):
        _, inputs = steps(inputs)
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    loss, inputs = steps(inputs)  # reads the loss, as the example does, and so waits for all of it but the update
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    return {"seconds": seconds, "peak_gib": peak}, inputs, loss


def ceiling(device: str) -> float:
    """Operations per second of a large bf16 matrix product on random data, the median of ten."""
    import torch

    side = 8192 if device == "cuda" else 256
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(13):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * side**3 / statistics.median(times[3:])


def scaling(options: Any) -> None:
    """Run the same step on one GPU, and on more under DDP and FSDP, and write the results."""
    import torch

    found = torch.cuda.device_count() if options.device == "cuda" else os.cpu_count() or 1
    runs: list[dict[str, Any]] = []
    for arm in options.arms:
        for kind in options.kinds:
            processes = 1 if kind == "one" else options.processes
            if processes > found:
                print(f"{kind}: left out, {processes} processes are more than {found} devices", file=sys.stderr)
            elif run := launch(options, arm, processes, kind):
                runs.append(run)
    if not runs:
        stop("nothing was measured")
    one = {run["arm"]: run["tokens_per_s"] for run in runs if run["kind"] == "one"}
    for run in runs:
        run["ratio_to_one"] = run["tokens_per_s"] / one[run["arm"]] if run["arm"] in one else None
    example = {arm: ARMS[arm] for arm in options.arms}
    configuration = {**vars(options), "out": None, "model": SHAPES[options.shape], "example": example}
    path = write(f"distill-scaling-{options.shape}", configuration, {"runs": runs}, options.out)
    print("| arm | | GPUs | s/step | tokens/s | to one | GiB per GPU | communication | not hidden |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for run in runs:
        ratio = f"{run['ratio_to_one']:.2f}" if run["ratio_to_one"] else ""
        print(
            f"| {run['arm']} | {run['kind']} | {run['processes']} | {show(run['seconds'])} "
            f"| {run['tokens_per_s']:,.0f} | {ratio} | {run['peak_gib']:.1f} "
            f"| {run['communication']:.1%} | {run['communication_not_hidden']:.1%} |"
        )
    plot_scaling(path, runs, options.shape)
    print(path)


def launch(options: Any, arm: str, processes: int, kind: str) -> dict[str, Any] | None:
    """One run under accelerate's launcher, whose output is shown; None if it failed."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--dynamo_backend", "no"]
    command += ["--num_processes", str(processes), "--mixed_precision", "bf16" if kind == "fsdp" else "no"]
    if kind == "fsdp":
        command += ["--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]
        command += ["--fsdp_transformer_layer_cls_to_wrap", "WanTransformerBlock"]
        command += ["--fsdp_cpu_ram_efficient_loading", "false"]
    elif kind == "ddp":
        command += ["--multi_gpu"]
    environment = {**os.environ, **({} if options.device == "cuda" else {"ACCELERATE_USE_CPU": "true"})}
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command += [__file__, "--worker", str(answer), "--shape", options.shape, "--device", options.device]
        command += ["--rounds", str(options.rounds), "--arms", arm]
        command += ["--student-blocks", str(options.student_blocks)]
        subprocess.run(command, env=environment, stdout=sys.stderr)
        if not answer.exists():
            print(f"{arm}, {kind}: failed, as told above", file=sys.stderr)
            return None
        return {"arm": arm, "kind": kind, "processes": processes, **json.loads(answer.read_text())}


def scaling_worker(options: Any) -> None:
    """One process of such a run: the first one writes what was measured."""
    import torch
    from accelerate import Accelerator
    from accelerate.utils import DistributedType

    from tiedquiet.distill.speed import shard

    accelerator = Accelerator()
    sharded, cuda = accelerator.distributed_type is DistributedType.FSDP, accelerator.device.type == "cuda"
    steps = Steps(SHAPES[options.shape], accelerator.device, options.student_blocks)
    steps.choose(options.arms[0])
    if sharded:
        shard(None if steps.segments else steps.teacher, accelerator)
    steps.distillation.student, steps.optimizer = accelerator.prepare(steps.student, steps.optimizer)
    inputs, measured = steps.inputs(), []
    for number in range(options.rounds):
        with accelerator.autocast():
            one, inputs, loss = timed(steps, inputs, cuda, warm=1 if number else 2)
        measured.append(one)
        if accelerator.is_main_process:
            print(f"step {number}: {one['seconds']:.3f} s, {one['peak_gib']:.1f} GiB, loss {loss:.4f}")
    with torch.profiler.profile() as profile, accelerator.autocast():
        steps(inputs)
        if cuda:
            torch.cuda.synchronize()
    if accelerator.is_main_process:
        seconds = [one["seconds"] for one in measured]
        tokens = accelerator.num_processes * latent_tokens(SHAPES[options.shape])
        told = {
            "seconds": spread(seconds),
            "tokens_per_s": tokens / statistics.median(seconds),
            "peak_gib": max(one["peak_gib"] for one in measured),
            "loss": loss,
            **communication(profile, cuda),
        }
        Path(options.worker).write_text(json.dumps(told))
    accelerator.end_training()


def communication(profile: Any, cuda: bool) -> dict[str, float]:
    """The share of a step in which something is communicated, and that in which nothing else is done."""
    from torch.autograd import DeviceType

    device = DeviceType.CUDA if cuda else DeviceType.CPU
    spans = {True: list[tuple[float, float]](), False: list[tuple[float, float]]()}
    for event in profile.events():
        if event.device_type == device:
            name = event.name.lower()
            spans["nccl" in name or "gloo" in name].append((event.time_range.start, event.time_range.end))
    busy = covered(spans[True] + spans[False])
    return {
        "communication": covered(spans[True]) / busy,
        "communication_not_hidden": (busy - covered(spans[False])) / busy,
    }


def covered(spans: list[tuple[float, float]]) -> float:
    """The length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def plot_scaling(path: Path, runs: list[dict[str, Any]], shape: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    arms = list(dict.fromkeys(run["arm"] for run in runs))
    figure, axes = plt.subplots(len(arms), 3, figsize=(PAGE_INCHES, 2.8 * len(arms) + 0.4), squeeze=False)
    for row, arm in zip(axes, arms, strict=True):
        ours = [run for run in runs if run["arm"] == arm]
        names = [f"{run['kind']}\n{run['processes']} GPUs" if run["processes"] > 1 else "one GPU" for run in ours]
        speeds = row[0].bar(names, [run["tokens_per_s"] for run in ours])
        row[0].bar_label(speeds, [f"{run['ratio_to_one']:.2f}x" if run["ratio_to_one"] else "" for run in ours])
        row[0].margins(y=0.1)
        row[0].set(title="tokens/s", ylabel=textwrap.fill(arm, 24))
        row[1].bar(names, [run["peak_gib"] for run in ours])
        row[1].set(title="GiB, peak per GPU")
        row[2].bar(names, [100 * run["communication"] for run in ours])
        row[2].bar(names, [100 * run["communication_not_hidden"] for run in ours], color="tab:red")
        row[2].set(title="communication, % of a\nstep (red: not hidden)")
    figure.suptitle(f"one distillation step, {shape}")
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=150)


def report(results: dict[str, Any]) -> None:
    print(
        "| arm | s/step | tokens/s | of the ceiling | peak GiB | teacher's error | gradients' |\n"
        "| --- | --- | --- | --- | --- | --- | --- |"
    )
    for name, arm in results["arms"].items():
        error = f"{arm['teacher_error']:.1e}" if "teacher_error" in arm else ""
        print(
            f"| {name} | {show(arm['seconds'])} | {arm['tokens_per_s']:,.0f} | {arm['percent_of_ceiling']:.1f} % "
            f"| {arm['peak_gib']:.1f} | {error} | {arm['gradient_error']['error']:.1e} |"
        )
    for name, why in results["failed"].items():
        print(f"| {name} | {why} | | | | | |")
    moved = results["weights_moved_by_one_step"]
    print(f"ceiling: {results['ceiling_teraflop_per_s']['highest']:.0f} TFLOP/s")
    print(f"weights that one step moves: {moved['float32']:.1%}; kept in bf16 it would be {moved['bfloat16']:.1%}")


def plot(path: Path, results: dict[str, Any], shape: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    arms = results["arms"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(PAGE_INCHES, 0.6 * len(arms) + 1.6), sharey=True)
    names = [textwrap.fill(name, 30) for name in arms]
    left.barh(names, [arm["percent_of_ceiling"] for arm in arms.values()])
    left.set(xlabel="useful arithmetic, % of\nthe matrix-product ceiling", title=shape)
    right.barh(names, [arm["peak_gib"] for arm in arms.values()], color="tab:orange")
    right.set(xlabel="peak memory, GiB")
    left.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=150)


if __name__ == "__main__":
    main()
