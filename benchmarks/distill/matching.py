"""One update of the second stage, whole weights and LoRA: seconds, share of the ceiling, memory; beside the plan.

    python -m benchmarks.distill.matching                     # one GPU: Wan2.1-T2V-1.3B shape, 480x832x81 frames
    python -m benchmarks.distill.matching --shape wan2.2-a14b --arms lora        # one H200
    python -m benchmarks.distill.matching --shape tiny --device cpu --rounds 1

Random weights, batch 1, bf16, AdamW; the second of two steps, so one pass of the student leads to its own state. An
update is that of `tiedquiet.distill.train`: the student's own state, its clip, the guided teacher's and the critic's
scores of it, renoised, a segment beside it, and two updates of the critic. Only the arithmetic that this needs is
counted, against the largest bf16 matrix product of the same run: forward once, backward twice that, once that where a
weight is frozen and only what flows through it is asked for. Beside it stands what `--plan` says: its seconds are from
blocks that are timed before, its memory is weights, gradients and Adam's moments, and what blocks leave for the
backward pass.
"""

import gc
import math
import statistics
import time
from argparse import Namespace
from types import SimpleNamespace
from typing import Any

from benchmarks.distill.shapes import CHANNELS, SHAPES, models, useful_flops
from benchmarks.distill.steps import ceiling
from benchmarks.record import arguments, spread, stop, write

RANK = 64
ARMS = {"whole": {}, "lora": {"lora_rank": RANK}}
NODES, STEPS = 2, 1_000.0


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--shape", default="wan2.1-1.3b", help=f"one of {', '.join(SHAPES)} (default: %(default)s)")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="timed updates of each arm (default: %(default)s)")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--compile", action="store_true", help="compile the blocks")
    options = parser.parse_args()
    if options.shape not in SHAPES:
        stop(f"no shape {options.shape!r}; there are {', '.join(SHAPES)}")
    if options.rounds < 1:
        stop("at least one round")
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        stop("no CUDA device; --device cpu --shape tiny tries it out")
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

    from tiedquiet.distill import plan
    from tiedquiet.distill.lora import Adapter
    from tiedquiet.distill.pipeline import Expert, Nodes, new_student
    from tiedquiet.distill.speed import speed_up
    from tiedquiet.distill.train import Distillation

    args, shape, device = settings(options, arm), SHAPES[options.shape], torch.device(options.device)
    cuda, lora = device.type == "cuda", bool(args.lora_rank)
    form = (CHANNELS, shape["f"], shape["h"], shape["w"])
    if cuda:
        torch.cuda.empty_cache()
    base, spare = models(shape, device, "float32", 1)
    del spare
    block = plan.measured(args, SimpleNamespace(transformer=dict(base.config), latents=lambda args: form), device)
    if cuda:
        torch.cuda.empty_cache()
    student: Any
    critic: Any
    if lora:
        frozen: Any = Adapter(base, None)
        student, critic = (Adapter(base, name).add(RANK, seed) for seed, name in enumerate(("student", "critic")))
        speed_up([], [base], args)
    else:
        frozen = base
        student, critic = (new_student(base, shape["blocks"], torch.float32).train() for _ in range(2))
        speed_up([base], [student, critic], args)
    nodes = Nodes(torch.tensor([999.0, 833.0]), torch.tensor([1.0, 0.833, 0.0]))
    expert = Expert("transformer", 0.0, STEPS, int(STEPS), 5.0)
    it = Distillation(args, frozen, student, expert, critic, nodes)
    optimizers = {of: torch.optim.AdamW(of.parameters(), lr=1e-6, fused=cuda or None) for of in (student, critic)}
    text, empty = (torch.randn(1, shape["tokens"], shape["text"], device=device) for _ in range(2))
    x, target, noise = (torch.randn(1, *form, device=device) for _ in range(3))
    sigma, at = torch.tensor([0.6], device=device), torch.tensor([833.0], device=device)

    def learn(model: Any, loss: Any) -> None:
        if lora:
            model.activate()
        loss.backward()

    def move(model: Any) -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers[model].step()
        optimizers[model].zero_grad()

    def update() -> float:
        autocast = torch.autocast(device.type, torch.bfloat16)
        with autocast:
            state = it.own_state(x, text, 0, 1)
        with autocast:
            loss, clip = it.matching(state, 1, text, empty, sigma, noise)
        learn(student, loss)
        with autocast:
            segment = it.loss(x, at, text, target)[0]
        learn(student, args.segment_weight * segment)
        move(student)
        for _ in range(args.critic_steps):
            with autocast:
                criticism = it.criticism(clip, text, sigma, noise)
            learn(critic, criticism)
            move(critic)
        return float(loss.detach() + criticism.detach())

    torch._dynamo.config.recompile_limit = 100
    seconds = []
    for number in range(options.rounds + 1):  # the first warms up
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
    forward, learning = plan.step_blocks(args, "matching", shape["blocks"], [1])
    per_block = useful_flops({**shape, "blocks": 1}, 0, teacher=True)
    return {
        "seconds": spread(seconds),
        "mean": statistics.mean(seconds),
        "useful_teraflop": per_block * (forward + (2 if lora else 3) * learning) / 1e12,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0,
        "planned_seconds": forward * block.forward + learning * block.learning,
        "planned_gib": (plan.memory(args, dict(base.config)) + block.kept * shape["blocks"]) / 2**30,
        "block": vars(block),
        "loss": value,
    }


if __name__ == "__main__":
    main()
