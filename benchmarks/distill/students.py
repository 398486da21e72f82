r"""The control: students of few steps, stage by stage, of the same teacher and from the same seeds.

    python -m benchmarks.distill.students                 # three seeds of each; hours on two CPU cores
    python -m benchmarks.distill.students --jobs 18       # all at once on a GPU: minutes, with CUDA's MPS
    python -m benchmarks.distill.students --seeds 1 --max_train_steps 2 --distribution_matching_steps 1 \
        --samples_per_prompt 1                            # does it run?

Every run is `python -m tiedquiet.distill` with the tiny teacher, and but for what STUDENTS has its default settings. A
student of N steps is measured after its segments and after distribution matching; beside it stands one that learnt by
distribution matching alone. The student of one step is the high-noise expert's. `velocity` has all its teacher's blocks
and learns the guided velocity, so that it needs no guidance either; it is sampled at the teacher's number of steps and
at four. `half the blocks` is the student of four steps with half of them, `1 step, at length` has more paths and more
updates. What a student draws is held against its teacher's clips from the same seeds. What it cost to make the data and
to train is counted in block passes, forward and twice that backward; seconds say something only where runs do not share
a machine. All runs share one cache, so all seeds learn from the same paths. The pictures of each student's first run
lie beside the results.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.record import arguments, spread, stop, write

ALONE = ["--max_train_steps", "0", "--segment_weight", "0"]
# 40 times as many samples as by default, of 25 times as many paths, at three times the rate.
AT_LENGTH = [
    *("--samples_per_prompt", "1000", "--max_train_steps", "3000", "--train_batch_size", "256"),
    *("--learning_rate", "3e-3", "--lr_warmup_steps", "200", "--adam_beta2", "0.95"),
    *("--distribution_matching_steps", "0"),
]
STUDENTS = {
    "4 steps": ["--student_steps", "4"],
    "2 steps": ["--student_steps", "2"],
    "1 step": ["--student_steps", "1", "--expert", "high"],
    "4 steps, DMD2 alone": ["--student_steps", "4", *ALONE],
    "2 steps, DMD2 alone": ["--student_steps", "2", *ALONE],
    "1 step, DMD2 alone": ["--student_steps", "1", "--expert", "high", *ALONE],
    "velocity": ["--student_steps", "0", "--student_blocks", "6", "--guidance_scale", "3"],
    "half the blocks": ["--student_steps", "4", "--student_blocks", "3"],
    "1 step, at length": ["--student_steps", "1", "--expert", "high", *AT_LENGTH],
}
PASSED = ("prompts_file", "max_train_steps", "distribution_matching_steps", "samples_per_prompt")
MEASURES = ("adherence", "psnr", "spread_of_place", "spread_of_size", "speed_of_motion", "block_passes")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each student (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: %(default)s)")
    parser.add_argument("--students", nargs="+", choices=list(STUDENTS), default=list(STUDENTS))
    add_passed(parser)
    options = parser.parse_args()
    if options.seeds < 1 or options.jobs < 1:
        stop("at least one seed, and one job")
    passed = passed_on(options)
    with tempfile.TemporaryDirectory() as cache, ThreadPoolExecutor(options.jobs) as pool:
        plan = [(name, seed) for seed in range(options.seeds) for name in options.students]
        runs = list(pool.map(lambda of: one(*of, passed, cache), plan))
    arms: dict[str, list[dict[str, float]]] = {}
    for run in runs:
        for arm, measured in run["arms"].items():
            # One that begins as its teacher is its teacher without guidance.
            kind = arm if arm.startswith("teacher") else f"{run['student']}: {arm}"
            arms.setdefault(kind, []).append(measured)
    table = {
        arm: {m: spread([x[m] for x in each]) for m in MEASURES if all(m in x for x in each)}
        for arm, each in arms.items()
    }
    cost = {
        name: {
            "seconds": spread([run["training_seconds"] for run in runs if run["student"] == name]),
            "block_passes": next(run["cost"] for run in runs if run["student"] == name),
        }
        for name in options.students
    }
    pictures: dict[str, bytes] = {}
    for run in runs:
        pictures.setdefault(run["student"], run.pop("picture"))  # of the first seed
    *_, prompts = (run.pop("prompts") for run in runs)  # the same of all
    results = {"arms": table, "training": cost, "prompts": prompts, "runs": runs}
    import torch  # noqa: F401 - so that the record names the GPU on which the runs trained

    path = write(theme(options.students), {**vars(options), "out": None, "flags": STUDENTS}, results, options.out)
    for name, picture in pictures.items():
        pictured(path, name, options.students).write_bytes(picture)
    print(f"| | {' | '.join(m.replace('_', ' ') for m in MEASURES)} |\n| --- |{' ---: |' * len(MEASURES)}")
    for arm, measures in table.items():
        print(f"| {arm} | {' | '.join(cell(measures[m]) if m in measures else '' for m in MEASURES)} |")
    for name, spent in cost.items():
        data, training = (f"{spent['block_passes'][what]:,}" for what in ("data", "training"))
        print(
            f"{name}: {data} block passes to make the data, {training} to train, {cell(spent['seconds'])} s of training"
        )
    print(path)


def theme(students: Sequence[str]) -> str:
    """What the results are called: those of one student alone are no control."""
    return "distill-students" + (f"-{slug(students[0])}" if len(students) == 1 else "")


def pictured(path: Path, student: str, students: Sequence[str]) -> Path:
    """Where a student's picture lies, beside the results; those of one alone have its name already."""
    return path.with_name(f"{path.stem}_{slug(student)}.png") if len(students) > 1 else path.with_suffix(".png")


def slug(name: str) -> str:
    """A student's name as part of a file's."""
    return name.replace(",", "").replace(" ", "-")


def add_passed(parser: argparse.ArgumentParser) -> None:
    """What a run of the example is given as it is, for a short trial."""
    parser.add_argument("--prompts_file", help="passed on, as are the next three; for a short trial")
    for name in PASSED[1:]:
        parser.add_argument(f"--{name}", type=int)


def passed_on(options: Any) -> dict[str, str]:
    """Of these, those that were given."""
    return {name: str(value) for name in PASSED if (value := getattr(options, name)) is not None}


def one(student: str, seed: int, passed: dict[str, str], cache: str) -> dict[str, Any]:
    """A whole run of a student; its progress goes to stderr."""
    return run(student, flags(student, passed), seed, cache)


def run(student: str, words: Sequence[str], seed: int, cache: str) -> dict[str, Any]:
    """A whole run of the example with these words for it, and what came of it."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        command = [sys.executable, "-m", "tiedquiet.distill", *words, "--seed", str(seed)]
        command += ["--cache_dir", cache, "--output_dir", str(out)]
        done = subprocess.run(command, stdout=sys.stderr, cwd=Path(__file__).parents[2])
        if done.returncode:
            stop(f"{student}, seed {seed}: failed, as told above")
        told = {"student": student, "seed": seed, **json.loads((out / "metrics.json").read_text())}
        args = json.loads((out / "args.json").read_text())
        cost = passes({**args, "prompts": len(told["prompts"])})
        return {**told, "cost": cost, "picture": (out / "samples.png").read_bytes()}


def flags(student: str, passed: dict[str, str]) -> list[str]:
    """A student's own settings, before those that are passed on, which undo none that leaves something out."""
    own = dict(zip(STUDENTS[student][::2], STUDENTS[student][1::2], strict=True))
    kept = {name: value for name, value in passed.items() if own.get(f"--{name}") != "0"}
    if own["--student_steps"] == "0":
        kept.pop("distribution_matching_steps", None)
    return [*STUDENTS[student], *(word for name, value in kept.items() for word in (f"--{name}", value))]


def passes(args: dict[str, Any]) -> dict[str, int]:
    """Blocks that samples passed through, guided, to make the data, and in training; backward counts twice."""
    from tiedquiet.distill.options import needs_paths
    from tiedquiet.distill.pipeline import Teacher, nodes

    teacher, settings = Teacher(args["pretrained_model_name_or_path"]), argparse.Namespace(**args)
    blocks, mine = teacher.transformer["num_layers"], args["student_blocks"]
    experts = teacher.experts[:1] if args["expert"] == "high" else teacher.experts
    samples = args["samples_per_prompt"] * args["prompts"] if needs_paths(settings) else 0
    first, second = (len(experts) * args[of] for of in ("max_train_steps", "distribution_matching_steps"))
    step = 3 * mine + (0 if args["student_steps"] else 2 * blocks)
    total = float(first * step)
    if second:
        own = [nodes(teacher.scheduler, args["student_steps"]).of(expert) for expert in experts]
        states = sum(sum(each) / len(each) for each in own) / len(own) * mine  # on the way to a state of its own
        # the student's clip, two passes of the teacher, the critic's score, what the critic learns, a segment
        total += second * (states + 3 * mine + 3 * blocks + 3 * args["critic_steps"] * blocks)
        total += second * (3 * mine if args["segment_weight"] else 0)
    return {
        "data": samples * 2 * args["num_inference_steps"] * blocks,
        "training": round(total * args["train_batch_size"]),
    }


def cell(values: dict[str, float]) -> str:
    """Median and range, or the one value where all agree."""
    if values["min"] == values["max"]:
        return f"{values['median']:.4g}"
    return f"{values['median']:.3g} ({values['min']:.3g} to {values['max']:.3g})"


if __name__ == "__main__":
    main()
