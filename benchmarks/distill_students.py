"""The control: a student of four steps beside one that learnt the teacher's velocity, same teacher, seeds and steps.

    python benchmarks/distill_students.py                 # three seeds of each; an hour on two CPU cores
    python benchmarks/distill_students.py --seeds 1 --max_train_steps 2 --samples_per_prompt 1      # does it run?

Every run is `python -m tiedquiet.distill` with the tiny teacher, all its blocks, and as many optimizer steps. The
velocity student learns the guided velocity, so that neither needs guidance; it is sampled at the teacher's number of
steps and at four. What a student draws is held against its teacher's clips from the same seeds.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.record import arguments, spread, stop, write

STUDENTS = {
    "segments": ["--student_steps", "4"],
    "velocity": ["--student_steps", "0", "--student_blocks", "6", "--guidance_scale", "3"],
}
MEASURES = ("adherence", "psnr", "spread_of_place", "spread_of_size", "speed_of_motion", "block_passes")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each student (default: %(default)s)")
    parser.add_argument("--students", nargs="+", choices=list(STUDENTS), default=list(STUDENTS))
    parser.add_argument("--prompts_file", help="passed on, as are the next two; for a short trial")
    parser.add_argument("--max_train_steps", type=int)
    parser.add_argument("--samples_per_prompt", type=int)
    options = parser.parse_args()
    if options.seeds < 1:
        stop("at least one seed")
    passed = [
        word
        for name in ("prompts_file", "max_train_steps", "samples_per_prompt")
        if (value := getattr(options, name)) is not None
        for word in (f"--{name}", str(value))
    ]
    runs = [one(name, seed, passed) for seed in range(options.seeds) for name in options.students]
    arms: dict[str, list[dict[str, float]]] = {}
    for run in runs:
        for arm, measured in run["arms"].items():
            kind = f"{run['student']}: {arm}" if arm.startswith("student") else arm
            arms.setdefault(kind, []).append(measured)
    table = {arm: {m: spread([x[m] for x in each]) for m in MEASURES if m in each[0]} for arm, each in arms.items()}
    cost = {
        name: spread([run["training_seconds"] for run in runs if run["student"] == name]) for name in options.students
    }
    results = {"arms": table, "training_seconds": cost, "runs": runs}
    path = write("distill-students", {**vars(options), "out": None, "flags": STUDENTS}, results, options.out)
    print(f"| | {' | '.join(m.replace('_', ' ') for m in MEASURES)} |\n| --- |{' ---: |' * len(MEASURES)}")
    for arm, measures in table.items():
        print(f"| {arm} | {' | '.join(cell(measures[m]) if m in measures else '' for m in MEASURES)} |")
    for name, seconds in cost.items():
        print(f"training, {name}: {cell(seconds)} s")
    print(path)


def one(student: str, seed: int, passed: list[str]) -> dict[str, Any]:
    """A whole run of the example; its progress goes to stderr."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        command = [sys.executable, "-m", "tiedquiet.distill", *STUDENTS[student], "--seed", str(seed), *passed]
        done = subprocess.run([*command, "--output_dir", str(out)], stdout=sys.stderr, cwd=Path(__file__).parents[1])
        if done.returncode:
            stop(f"{student}, seed {seed}: failed, as told above")
        return {"student": student, "seed": seed, **json.loads((out / "metrics.json").read_text())}


def cell(values: dict[str, float]) -> str:
    """Median and range, or the one value where all agree."""
    if values["min"] == values["max"]:
        return f"{values['median']:.4g}"
    return f"{values['median']:.3g} ({values['min']:.3g} to {values['max']:.3g})"


if __name__ == "__main__":
    main()
