"""One distillation step of the example, arm beside arm: seconds, tokens, useful arithmetic, memory.

    python -m benchmarks.distill.step                     # one GPU: Wan2.1-T2V-1.3B shape, 480x832x81 frames
    python -m benchmarks.distill.step --scaling           # one and two GPUs: DDP and FSDP through accelerate
    python -m benchmarks.distill.step --shape tiny --device cpu --rounds 2

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
import sys
import textwrap
from pathlib import Path
from typing import Any

from benchmarks.distill.scaling import scaling, scaling_worker
from benchmarks.distill.shapes import ARMS, REFERENCE, SCALED, SHAPES, latent_tokens, segments, useful_flops
from benchmarks.distill.steps import Steps, ceiling, gradient_error, timed
from benchmarks.record import PAGE_INCHES, arguments, show, spread, stop, turned, write


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
        scaling(options, "step", ARMS, ["--student-blocks", str(options.student_blocks)])
    else:
        one_device(options)


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
            for arm in turned(options.arms, number):
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
