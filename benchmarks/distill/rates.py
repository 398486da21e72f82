r"""Which learning rates adapters want: those of whole weights times some number, on the tiny task.

    python -m benchmarks.distill.rates --jobs 18          # on a GPU: minutes, with CUDA's MPS
    python -m benchmarks.distill.rates --ranks 8 --times 1 10 --apart --prompts_file TWO_PROMPTS \
        --max_train_steps 2 --distribution_matching_steps 1 --samples_per_prompt 1            # does it run?

Every run is `python -m tiedquiet.distill --student_steps 2 --lora_rank R` with the tiny teacher, and the rates of both
stages and of the critic are the default ones of whole weights, times one of `--times`. At the ranks of `--apart` there
are runs besides whose first stage has ten times the rate, as is usual for adapters, and the second stage's student or
its critic others. A student of whole weights, as long and from the same seed, is beside them. What a student draws is
held against its teacher's clips from the same seeds, after each stage.
"""

import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from benchmarks.distill.students import MEASURES, add_passed, passed_on, run
from benchmarks.record import PAGE_INCHES, arguments, stop, write

APART = [(10, 1, 1), (10, 3, 3), (10, 30, 30), (10, 3, 10), (10, 10, 3)]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 16, 64])
    parser.add_argument("--times", nargs="+", type=float, default=[1, 3, 10, 30])
    parser.add_argument("--apart", nargs="*", type=int, default=[64], help="ranks at which stages differ as well")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: %(default)s)")
    add_passed(parser)
    options = parser.parse_args()
    if options.jobs < 1 or min([*options.times, *options.ranks]) <= 0:
        stop("at least one job, and ranks and numbers above 0")
    arms = [(0, (1.0, 1.0, 1.0))]
    arms += [(rank, (times,) * 3) for rank in options.ranks for times in options.times]
    arms += [(rank, times) for rank in options.apart for times in APART]
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as cache, ThreadPoolExecutor(options.jobs) as pool:
        going = [pool.submit(one, options, *arm, seed, cache) for seed in options.seeds for arm in arms]
        import torch  # noqa: F401 - so that the record names the GPU on which the runs trained

        for done in as_completed(going):
            runs.append(done.result())
            # After each: what is measured stays if the time does not suffice for all.
            path = write("distill-rates", {**vars(options), "out": None}, {"runs": runs}, options.out)
    runs.sort(key=lambda told: (told["rank"], told["times"], told["seed"]))
    print(f"| rank | rates, times | after | {' | '.join(m.replace('_', ' ') for m in MEASURES)} |")
    print(f"| ---: | ---: | --- |{' ---: |' * len(MEASURES)}")
    for told in runs:
        if "failed" in told:
            print(f"| {told['rank'] or 'whole'} | {told['name']} | failed |{' |' * len(MEASURES)}")
        for arm, measured in told["arms"].items():
            if not arm.startswith("teacher"):
                cells = " | ".join(f"{measured[m]:.3g}" if m in measured else "" for m in MEASURES)
                print(f"| {told['rank'] or 'whole'} | {told['name']} | {arm} | {cells} |")
    plot(path, runs)
    print(path)


def one(options: Any, rank: int, times: tuple[float, ...], seed: int, cache: str) -> dict[str, Any]:
    """A run at a rank, 0 for whole weights, and its rates as parts of the default ones."""
    from tiedquiet.distill.options import RATES, TINY

    words = ["--student_steps", "2", "--lora_rank", str(rank)]
    for name, factor in zip(RATES, times, strict=True):
        words += [f"--{name}", str(TINY[name] * factor)]
    words += [word for name, value in passed_on(options).items() for word in (f"--{name}", value)]
    name = f"{times[0]:g}" if len(set(times)) == 1 else ", ".join(f"{each:g}" for each in times)
    arm = {"name": name, "rank": rank, "times": times, "seed": seed}
    try:
        told = run(f"rank {rank}, {name} times", words, seed, cache)
    except SystemExit:  # it ends where a loss is no longer finite: that is a result, too
        return {**arm, "failed": True, "arms": {}}
    return {**arm, **{key: told[key] for key in ("arms", "losses", "training_seconds", "seconds")}}


def plot(path: Path, runs: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(PAGE_INCHES, 3.2))
    ranks = sorted({told["rank"] for told in runs})
    for axis, measure, words in zip(axes, ("adherence", "psnr"), ("adherence", "PSNR, dB"), strict=True):
        for color, rank in enumerate(ranks):
            alike = [told for told in runs if told["rank"] == rank and told["arms"] and len(set(told["times"])) == 1]
            for stage, line in (("segments, 2 steps", ":"), ("student, 2 steps", "-")):
                points = [(told["times"][0], told["arms"][stage][measure]) for told in alike]
                if rank and points:
                    label = f"rank {rank}, {stage.split(',')[0]}"
                    axis.plot(*zip(*points, strict=True), line, marker="o", ms=3, color=f"C{color}", label=label)
                elif points:
                    axis.axhline(points[0][1], ls=line, color=f"C{color}", label=f"whole, {stage.split(',')[0]}")
        axis.set(xscale="log", xlabel="times the rates of whole weights", title=words)
    axes[1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
