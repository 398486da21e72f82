"""What tiedquiet costs at start-up, in whole processes.

    python -m benchmarks.load.startup

Two small virtual environments are made, which borrow every library of this one: one with tiedquiet's start-up file in
its site-packages, one without. Commands are run in rotating order, and each is compared with its baseline of the same
round: the start-up file with `TIEDQUIET` unset and set, `import tiedquiet` beside `import wrapt`, and `import
tiedquiet` in a program that imports a model of transformers anyway.
"""

import os
import statistics
import subprocess
import tempfile
import time
import venv
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.record import PAGE_INCHES, arguments, show, spread, stop, turned, write

ROOT = Path(__file__).parents[2]
MODEL = "from transformers import UMT5EncoderModel"


class Command(NamedTuple):
    environment: str
    code: str
    mode: str | None = None
    baseline: str | None = None
    heavy: bool = False


COMMANDS = {
    "bare Python": Command("without", "pass"),
    "bare Python again": Command("without", "pass", baseline="bare Python"),
    "start-up file, TIEDQUIET unset": Command("with", "pass", baseline="bare Python"),
    "start-up file, TIEDQUIET=1": Command("with", "pass", mode="1", baseline="bare Python"),
    "import wrapt": Command("without", "import wrapt"),
    "import tiedquiet": Command("without", "import tiedquiet", baseline="import wrapt"),
    "import a model": Command("without", MODEL, heavy=True),
    "import a model again": Command("without", MODEL, baseline="import a model", heavy=True),
    "import tiedquiet, then a model": Command("without", f"import tiedquiet; {MODEL}", None, "import a model", True),
    "the same by TIEDQUIET=1": Command("with", MODEL, "1", "import a model", True),
}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=40, help="rounds of the light commands (default: %(default)s)")
    parser.add_argument("--heavy-rounds", type=int, default=10, help="of those that import a model (default: 10)")
    options = parser.parse_args()
    if options.rounds < 2 or options.heavy_rounds < 2:
        stop("at least two rounds: the first one warms the disk cache and is not counted")
    with tempfile.TemporaryDirectory() as folder:
        pythons = environments(Path(folder))
        runs: dict[str, list[float]] = {name: [] for name in COMMANDS}
        measure(pythons, runs, {n: c for n, c in COMMANDS.items() if not c.heavy}, options.rounds)
        measure(pythons, runs, {n: c for n, c in COMMANDS.items() if c.heavy}, options.heavy_rounds)
    results = {}
    for name, command in COMMANDS.items():
        results[name] = {"seconds": spread(runs[name]), "runs": runs[name], "baseline": command.baseline}
        if command.baseline:
            pairs = list(zip(runs[name], runs[command.baseline], strict=True))
            results[name]["added_seconds"] = spread([own - base for own, base in pairs])
            results[name]["ratio"] = spread([own / base for own, base in pairs])
    path = write("startup", {**vars(options), "out": None}, results, options.out)
    plot(path, results)
    report(results)
    print(path)


def environments(folder: Path) -> dict[str, str]:
    """Two virtual environments that borrow this one's libraries; only one has the start-up file."""
    from tests.compat.__main__ import borrow, interpreter

    pythons = {}
    for name in ("without", "with"):
        venv.create(folder / name, with_pip=False)
        # A folder added by a .pth file has its own .pth files left alone: the start-up file here is not run there.
        own = borrow(interpreter(folder / name), ROOT)
        if name == "with":
            for part in ("tiedquiet.pth", "_tiedquiet_startup.py"):
                (own / part).write_text((ROOT / "tiedquiet" / "startup" / part).read_text())
        pythons[name] = str(interpreter(folder / name))
    return pythons


def measure(pythons: dict[str, str], runs: dict[str, list[float]], commands: dict[str, Command], rounds: int) -> None:
    from tqdm import tqdm

    clean = {k: v for k, v in os.environ.items() if k not in ("TIEDQUIET", "AUTOWRAPT_BOOTSTRAP", "PYTHONPATH")}
    names = list(commands)
    with tqdm(total=rounds * len(names), unit="process") as bar:
        for number in range(rounds):
            for name in turned(names, number):
                command = commands[name]
                environment = {**clean, "TIEDQUIET": command.mode} if command.mode else clean
                line = [pythons[command.environment], "-c", command.code]
                start = time.perf_counter()
                subprocess.run(line, env=environment, check=True)
                seconds = time.perf_counter() - start
                if number:
                    runs[name].append(seconds)
                bar.update()


def plot(path: Path, results: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    compared = [name for name in results if results[name]["baseline"]]
    figure, axis = plt.subplots(figsize=(PAGE_INCHES, 4), constrained_layout=True)
    for place, name in enumerate(reversed(compared)):
        base = results[results[name]["baseline"]]["runs"]
        added = [1e3 * (own - other) for own, other in zip(results[name]["runs"], base, strict=True)]
        color = "tab:gray" if name.endswith("again") else "tab:green"
        axis.scatter(added, [place] * len(added), s=14, alpha=0.5, color=color)
        axis.vlines(statistics.median(added), place - 0.3, place + 0.3, color=color, linewidth=2)
    labels = [f"{name}\nagainst {results[name]['baseline']}" for name in reversed(compared)]
    axis.set_yticks(range(len(compared)), labels)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_xscale("symlog", linthresh=10)
    axis.set_xlabel("milliseconds added to the process, pair by pair\n(linear within ±10); bars: medians")
    axis.grid(axis="x", alpha=0.3)
    figure.savefig(path.with_suffix(".png"), dpi=150)


def report(results: dict[str, Any]) -> None:
    print("| process | ms, median (min to max) | against | ms added, median (min to max) | ratio, median |")
    print("| --- | ---: | --- | ---: | ---: |")
    for name, result in results.items():
        cells = [name, show(result["seconds"], 1e3, 1), "", "", ""]
        if result["baseline"]:
            cells[2:] = [result["baseline"], show(result["added_seconds"], 1e3, 1), f"{result['ratio']['median']:.3f}"]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
