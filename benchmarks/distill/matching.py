"""One update of the second stage, whole weights and LoRA: seconds, share of the ceiling, memory; beside the plan.

    python -m benchmarks.distill.matching --compile           # one GPU: Wan2.1-T2V-1.3B shape, 480x832x81 frames
    python -m benchmarks.distill.matching --compile --scaling # one and two GPUs: DDP and FSDP through accelerate
    python -m benchmarks.distill.matching --shape wan2.2-a14b --arms lora        # one H200
    python -m benchmarks.distill.matching --shape tiny --device cpu --rounds 1

Random weights, batch 1, bf16, AdamW; the second of two steps, so one pass of the student leads to its own state. An
update is that of `tiedquiet.distill.train`: the student's own state, its clip, the guided teacher's and the critic's
scores of it, renoised, a segment beside it, and two updates of the critic. Only the arithmetic that this needs is
counted, against the largest bf16 matrix product of the same run: forward once, backward twice that, once that where a
weight is frozen and only what flows through it is asked for. Beside it stands what `--plan` says: its seconds and its
activations are from blocks that are measured before, the rest of its memory is weights, gradients and Adam's moments.
"""

import argparse
import gc
import json
import math
import statistics
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.distill.scaling import communication, scaling
from benchmarks.distill.shapes import CHANNELS, SHAPES, latent_tokens, useful_flops, wan_transformer
from benchmarks.distill.steps import ceiling
from benchmarks.distill.updates import Update
from benchmarks.record import arguments, spread, stop, write

RANK = 64
ARMS: dict[str, dict[str, Any]] = {"whole": {}, "lora": {"lora_rank": RANK}}


def main() -> None:
    """Look at the command line, and measure."""
    parser = arguments(__doc__)
    parser.add_argument("--shape", default="wan2.1-1.3b", help=f"one of {', '.join(SHAPES)} (default: %(default)s)")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="timed updates of each arm (default: %(default)s)")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--compile", action="store_true", help="compile the blocks")
    parser.add_argument("--scaling", action="store_true", help="the arms on one GPU and on more")
    parser.add_argument(
        "--kinds", nargs="+", choices=["one", "ddp", "fsdp"], default=["one", "ddp", "fsdp"],
        help="with --scaling; adapters have no fsdp",
    )  # fmt: skip
    parser.add_argument("--processes", type=int, default=2, help="of ddp and fsdp (default: %(default)s)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.shape not in SHAPES:
        stop(f"no shape {options.shape!r}; there are {', '.join(SHAPES)}")
    if options.rounds < 1:
        stop("at least one round")
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        stop("no CUDA device; --device cpu --shape tiny tries it out")
    if options.worker:
        worker(options)
    elif options.scaling:
        scaling(options, "matching", ARMS, ["--compile"] if options.compile else [], without={("lora", "fsdp")})
    else:
        one_device(options)


def one_device(options: Any) -> None:
    """Measure every arm on one device and write the results."""
    ceilings, arms = [ceiling(options.device)], {}
    for arm in options.arms:
        arms[arm] = one(options, arm)
        gc.collect()
        ceilings.append(ceiling(options.device))
    top = max(ceilings)
    for told in arms.values():
        told["percent_of_ceiling"] = 100 * told["useful_teraflop"] * 1e12 / told["seconds"]["median"] / top
    results = {"ceiling_teraflop_per_s": top / 1e12, "arms": arms}
    configuration = {**vars(options), "out": None, "model": SHAPES[options.shape], "rank": RANK}
    path = write(f"distill-matching-{options.shape}", configuration, results, options.out)
    print("| | s/update | of the ceiling | peak GiB | planned: s, GiB |\n| --- | ---: | ---: | ---: | ---: |")
    for arm, told in arms.items():
        seconds = told["seconds"]
        print(
            f"| {arm} | {seconds['median']:.3f} ({seconds['min']:.3f} to {seconds['max']:.3f}) | "
            f"{told['percent_of_ceiling']:.1f} % | {told['peak_gib']:.1f} | {told['planned_seconds']:.2f}, "
            f"{told['planned_gib']:.1f} |"
        )
    print(path)


def settings(options: Any, arm: str) -> Namespace:
    """The example's own settings for such a run."""
    from tiedquiet.distill.options import parse

    args = parse("", ["--pretrained_model_name_or_path", "none", "--mixed_precision", "bf16", "--student_steps", "2"])
    shape = SHAPES[options.shape]
    vars(args).update(
        gradient_checkpointing="attention",
        compile=options.compile,
        distribution_matching_steps=options.rounds,
        student_blocks=shape["blocks"],
        max_sequence_length=shape["tokens"],
        task_weight=0.0,
        **ARMS[arm],
    )
    return args


def one(options: Any, arm: str) -> dict[str, Any]:
    """An arm: what an update took, and what was planned."""
    import torch
    from accelerate import Accelerator

    from tiedquiet.distill import plan

    torch.compiler.reset()  # of the arm before

    args, shape = settings(options, arm), SHAPES[options.shape]
    accelerator = Accelerator(mixed_precision="bf16", cpu=options.device == "cpu")
    form = (CHANNELS, shape["f"], shape["h"], shape["w"])
    config = wan_config(shape)
    teacher: Any = SimpleNamespace(transformer=config, latents=lambda args: form)
    block = plan.measured(args, teacher, accelerator.device)
    seconds, peak, value = timed(Update(args, shape, accelerator), options.rounds)
    accelerator.free_memory()
    forward, learning = plan.step_blocks(args, "matching", shape["blocks"], [1])
    per_block = useful_flops({**shape, "blocks": 1}, 0, teacher=True)
    return {
        "seconds": spread(seconds),
        "mean": statistics.mean(seconds),
        "useful_teraflop": per_block * (forward + (2 if args.lora_rank else 3) * learning) / 1e12,
        "peak_gib": peak,
        "planned_seconds": forward * block.forward + learning * block.learning,
        "planned_gib": (plan.memory(args, config) + block.activations) / 2**30,
        "block": vars(block),
        "loss": value,
    }


def wan_config(shape: dict[str, int]) -> dict[str, Any]:
    """The configuration of such a transformer."""
    import torch

    with torch.device("meta"):
        return dict(wan_transformer(shape).config)


def timed(update: Update, rounds: int) -> tuple[list[float], float, float]:
    """The seconds of each update after the first, which warms up; the highest peak of their GiB; the last loss."""
    import torch

    cuda = update.accelerator.device.type == "cuda"
    seconds, peak = [], 0.0
    for number in range(rounds + 1):
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        value = update()
        if cuda:
            torch.cuda.synchronize()
        if math.isnan(value):
            stop("the loss is not a number: the time of such an update says nothing")
        if number:
            seconds.append(time.perf_counter() - start)
            peak = max(peak, torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0)
    return seconds, peak, value


def worker(options: Any) -> None:
    """One process of several, or the one that they are held against: the first writes what was measured."""
    import torch
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs
    from torch.profiler import ProfilerActivity

    buckets = DistributedDataParallelKwargs(gradient_as_bucket_view=True)  # as the example has it
    accelerator = Accelerator(mixed_precision="bf16", kwargs_handlers=[buckets])
    cuda, shape = accelerator.device.type == "cuda", SHAPES[options.shape]
    update = Update(settings(options, options.arms[0]), shape, accelerator)
    seconds, peak, value = timed(update, options.rounds)
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profile:
        update()
        if cuda:
            torch.cuda.synchronize()
    if accelerator.is_main_process:
        told = {
            "seconds": spread(seconds),
            "tokens_per_s": accelerator.num_processes * latent_tokens(shape) / statistics.median(seconds),
            "peak_gib": peak,
            "loss": value,
            **communication(profile, cuda),
        }
        Path(options.worker).write_text(json.dumps(told))
    accelerator.end_training()


if __name__ == "__main__":
    main()
