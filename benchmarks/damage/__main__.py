"""Damaged files: what any class of transformers saves, changed at random, and what each mode makes of it.

    python -m benchmarks.damage --loads 2000                 # seeds 0 to 1999, in all cores
    python -m benchmarks.damage --seed 2000 --loads 2000     # others
    python -m benchmarks.damage --only 4711                  # what one seed draws, and what is wrong with it

From a seed it draws a class, one to three changes of the file that this class saves (tensors dropped, renamed, under
other prefixes, under two names, in two shards, in other types and shapes, another class's, junk), and who reads it: the
class, a user's subclass, an Auto class, the base model, in another type, or a Trainer that resumes. Each tensor keeps
the name that it had before it was renamed: what is right is known from the files and from what was done to them. All of
it is read without tiedquiet, and in each mode. The exit status is 1 if anything is wrong.
"""

import json
import time

from benchmarks.fuzz.running import in_processes, options_of, prepare


def main() -> int:
    from benchmarks.damage.judging import judged
    from benchmarks.fuzz import report
    from benchmarks.record import arguments

    parser = arguments(__doc__ or "")
    parser.prog = "python -m benchmarks.damage"
    options = options_of(parser, 500)
    if options.only is not None:
        prepare()
        line = judged(options.only)
        print(json.dumps(line, indent=1))
        return 1 if line.get("faults", True) else 0
    from tqdm import tqdm

    started = time.perf_counter()
    seeds = range(options.seed, options.seed + options.loads)
    lines = list(tqdm(in_processes(judged, seeds, options.jobs), total=options.loads, unit="load"))
    configuration = {
        "first_seed": options.seed,
        "loads": options.loads,
        "jobs": options.jobs,
        "seconds": round(time.perf_counter() - started),
        "classes": len({line["class"] for line in lines if not line["skipped"]}),
    }
    found = report.publish("damage", configuration, lines, options.out)
    return 1 if found["faults"] or found["errors"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
