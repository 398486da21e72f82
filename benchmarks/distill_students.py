"""The control: a student of four steps beside one that learnt the teacher's velocity, same teacher and seeds.

    python benchmarks/distill_students.py                 # three seeds of each; an hour on two CPU cores
    python benchmarks/distill_students.py --jobs 9        # all at once on a GPU: a few minutes
    python benchmarks/distill_students.py --seeds 1 --max_train_steps 2 --samples_per_prompt 1      # does it run?

Every run is `python -m tiedquiet.distill` with the tiny teacher and as many optimizer steps. `segments` has all its
teacher's blocks, `half the blocks` half of them. The velocity student has all, and learns the guided velocity, so that
it needs no guidance either; it is sampled at the teacher's number of steps and at four. What a student draws is held
against its teacher's clips from the same seeds. What it cost to make the data and to train is counted in block passes,
forward and twice that backward; seconds say something only where runs do not share a machine. The pictures of each
student's first run lie beside the results.
"""

import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.record import arguments, spread, stop, write

STUDENTS = {
    "segments": ["--student_steps", "4"],
    "half the blocks": ["--student_steps", "4", "--student_blocks", "3"],
    "velocity": ["--student_steps", "0", "--student_blocks", "6", "--guidance_scale", "3"],
}
MEASURES = ("adherence", "psnr", "spread_of_place", "spread_of_size", "speed_of_motion", "block_passes")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each student (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: %(default)s)")
    parser.add_argument("--students", nargs="+", choices=list(STUDENTS), default=list(STUDENTS))
    parser.add_argument("--prompts_file", help="passed on, as are the next two; for a short trial")
    parser.add_argument("--max_train_steps", type=int)
    parser.add_argument("--samples_per_prompt", type=int)
    options = parser.parse_args()
    if options.seeds < 1 or options.jobs < 1:
        stop("at least one seed, and one job")
    passed = [
        word
        for name in ("prompts_file", "max_train_steps", "samples_per_prompt")
        if (value := getattr(options, name)) is not None
        for word in (f"--{name}", str(value))
    ]
    with ThreadPoolExecutor(options.jobs) as pool:
        plan = [(name, seed) for seed in range(options.seeds) for name in options.students]
        runs = list(pool.map(lambda of: one(*of, passed), plan))
    arms: dict[str, list[dict[str, float]]] = {}
    for run in runs:
        for arm, measured in run["arms"].items():
            # One that begins as its teacher is its teacher without guidance.
            kind = f"{run['student']}: {arm}" if arm.startswith(("student", "untrained")) else arm
            arms.setdefault(kind, []).append(measured)
    table = {arm: {m: spread([x[m] for x in each]) for m in MEASURES if m in each[0]} for arm, each in arms.items()}
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
    results = {"arms": table, "training": cost, "runs": runs}
    import torch  # noqa: F401 - so that the record names the GPU on which the runs trained

    path = write("distill-students", {**vars(options), "out": None, "flags": STUDENTS}, results, options.out)
    for name, picture in pictures.items():
        path.with_name(f"{path.stem}_{name.replace(' ', '-')}.png").write_bytes(picture)
    print(f"| | {' | '.join(m.replace('_', ' ') for m in MEASURES)} |\n| --- |{' ---: |' * len(MEASURES)}")
    for arm, measures in table.items():
        print(f"| {arm} | {' | '.join(cell(measures[m]) if m in measures else '' for m in MEASURES)} |")
    for name, spent in cost.items():
        data, training = (f"{spent['block_passes'][what]:,}" for what in ("data", "training"))
        print(
            f"{name}: {data} block passes to make the data, {training} to train, {cell(spent['seconds'])} s of training"
        )
    print(path)


def one(student: str, seed: int, passed: list[str]) -> dict[str, Any]:
    """A whole run of the example; its progress goes to stderr."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        command = [sys.executable, "-m", "tiedquiet.distill", *STUDENTS[student], "--seed", str(seed), *passed]
        done = subprocess.run([*command, "--output_dir", str(out)], stdout=sys.stderr, cwd=Path(__file__).parents[1])
        if done.returncode:
            stop(f"{student}, seed {seed}: failed, as told above")
        told = {"student": student, "seed": seed, **json.loads((out / "metrics.json").read_text())}
        cost = passes(json.loads((out / "args.json").read_text()), out)
        return {**told, "cost": cost, "picture": (out / "samples.png").read_bytes()}


def passes(args: dict[str, Any], out: Path) -> dict[str, int]:
    """Blocks that samples passed through, guided, to make the data, and in training; backward counts twice."""
    blocks = json.loads((Path(args["pretrained_model_name_or_path"]) / "transformer/config.json").read_text())[
        "num_layers"
    ]
    samples = sum(1 for kind in ("paths", "latents") for _ in out.glob(f"cache/{kind}-*/*.safetensors"))
    step = 3 * args["student_blocks"] + (0 if args["student_steps"] else 2 * blocks)
    return {
        "data": samples * 2 * args["num_inference_steps"] * blocks,
        "training": 2 * args["max_train_steps"] * args["train_batch_size"] * step,
    }


def cell(values: dict[str, float]) -> str:
    """Median and range, or the one value where all agree."""
    if values["min"] == values["max"]:
        return f"{values['median']:.4g}"
    return f"{values['median']:.3g} ({values['min']:.3g} to {values['max']:.3g})"


if __name__ == "__main__":
    main()
