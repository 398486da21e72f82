"""The fuzzer of loads: random models and files, every verdict against the bytes.

    python -m benchmarks.fuzz --loads 20000                  # seeds 0 to 19999, in all cores
    python -m benchmarks.fuzz --seed 20000 --loads 20000     # others
    python -m benchmarks.fuzz --only 4711                    # what one seed draws, and what is wrong with it
    python -m benchmarks.fuzz --loads 2000 --mutations       # rules of the proof taken away, one at a time

From a seed it draws a class of transformers, files for it, code that writes to its tensors while it is loaded, and a
way to load it; then loads it in the modes `on`, `repair` and `strict`. What is true is read from the files, from a
model of the class that was built and not loaded, and from what happens to one name when the other is written to.
Memory is filled with NaN before it is handed out. The exit status is 1 if anything was hidden, missed, called wrongly,
repaired wrongly, or broken.
"""

import argparse
import json
import time

from benchmarks.fuzz.running import options_of, prepare, run, scratch


def main() -> int:
    from benchmarks.fuzz import report
    from benchmarks.fuzz import seeds as kept
    from benchmarks.record import arguments

    parser = arguments(__doc__ or "")
    parser.prog = "python -m benchmarks.fuzz"
    parser.add_argument("--mutations", action="store_true", help="take rules of the proof away, one at a time")
    parser.add_argument(
        "--keep", action="store_true", help="choose from these loads the seeds that tests/test_fuzz.py runs"
    )
    options = options_of(parser, 2000)
    if options.only is not None:
        return show(options.only)
    seeds = range(options.seed, options.seed + options.loads)
    if options.mutations:
        return mutations(options, seeds)
    started = time.perf_counter()
    lines = list(run(seeds, options.jobs))
    configuration = {
        "first_seed": options.seed,
        "loads": options.loads,
        "jobs": options.jobs,
        "seconds": round(time.perf_counter() - started),
    }
    if options.keep:
        kept.write(lines)
    return 1 if report.publish("fuzz", configuration, lines, options.out)["faults"] else 0


def show(seed: int) -> int:
    """Print one seed: its plan, what is true, what was said, and what is wrong."""
    prepare()
    from benchmarks.fuzz import judging

    result, told = judging.explained(seed, scratch())
    print(told)
    print(json.dumps(judging.as_line(result), indent=1))
    return 1 if result.faults else 0


def mutations(options: argparse.Namespace, seeds: range) -> int:
    """Which rules of the proof these seeds defend: each one that is taken away has to show."""
    import transformers

    from benchmarks.fuzz import report
    from benchmarks.fuzz.mutations import TABLE
    from benchmarks.record import write

    before = list(run(seeds, options.jobs))
    sound, mended = report.by_seed(before), report.repaired(before)
    found = {}
    for name in TABLE:
        lines = list(run(seeds, options.jobs, name))
        changed, left = report.by_seed(lines), report.repaired(lines)
        # What is no longer repaired and is told is no fault, but the rule is missed all the same.
        worse = sorted(seed for seed in changed if changed[seed] - sound[seed] or left[seed] < mended[seed])
        found[name] = {"found": len(worse), "seeds": worse[:5]}
        print(
            f"{'found' if worse else 'NOT FOUND':9} {name}: {len(worse)} of {len(seeds)} loads, {worse[:5]}", flush=True
        )
    configuration = {"first_seed": options.seed, "loads": options.loads, "jobs": options.jobs}
    write(f"fuzz-mutations-{transformers.__version__}", configuration, found, options.out)
    return 0 if all(each["found"] for each in found.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
