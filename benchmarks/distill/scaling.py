"""A step of either stage in one process and in more, under accelerate's launcher."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.distill.shapes import SHAPES, latent_tokens
from benchmarks.distill.steps import Steps, timed
from benchmarks.record import PAGE_INCHES, show, spread, stop, write


def scaling(
    options: Any,
    module: str,
    arms: Mapping[str, Any],
    more: Sequence[str] = (),
    without: Collection[tuple[str, str]] = (),
) -> None:
    """Run the same step on one GPU, and on more under DDP and FSDP, and write the results.

    Args:
        options: of the command line.
        module: of this folder, which has the step and a `--worker`.
        arms: what each passes to the example.
        more: words for the worker.
        without: arms and kinds that do not go together.
    """
    import torch

    found = torch.cuda.device_count() if options.device == "cuda" else os.cpu_count() or 1
    runs: list[dict[str, Any]] = []
    example = {arm: arms[arm] for arm in options.arms}
    theme = "distill-scaling" if module == "step" else f"distill-{module}-scaling"
    configuration = {**vars(options), "out": None, "model": SHAPES[options.shape], "example": example}
    for arm, kind in ((arm, kind) for arm in options.arms for kind in options.kinds if (arm, kind) not in without):
        processes = 1 if kind == "one" else options.processes
        if processes > found:
            print(f"{kind}: left out, {processes} processes are more than {found} devices", file=sys.stderr)
        elif run := launch(options, arm, processes, kind, module, more):
            runs.append(run)
            # After each: what is measured stays if the time does not suffice for all.
            one = {run["arm"]: run["tokens_per_s"] for run in runs if run["kind"] == "one"}
            for run in runs:
                run["ratio_to_one"] = run["tokens_per_s"] / one[run["arm"]] if run["arm"] in one else None
            path = write(f"{theme}-{options.shape}", configuration, {"runs": runs}, options.out)
    if not runs:
        stop("nothing was measured")
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


def launch(
    options: Any, arm: str, processes: int, kind: str, module: str, more: Sequence[str]
) -> dict[str, Any] | None:
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
        command += ["-m", f"benchmarks.distill.{module}", "--worker", str(answer)]
        command += ["--shape", options.shape, "--device", options.device]
        command += ["--rounds", str(options.rounds), "--arms", arm]
        command += more
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
        shard([] if steps.segments else [steps.teacher], accelerator)
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
    figure.suptitle(f"one step of distillation, {shape}")
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=150)
