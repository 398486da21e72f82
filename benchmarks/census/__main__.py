"""The census: every class of transformers that declares or carries ties, or every one, loaded back in many ways.

    python -m benchmarks.census                              # the transformers of this interpreter
    python -m benchmarks.census 5.0.0 5.2.0 5.3.0 5.13.1 5.20.2 5.24.0 --jobs 2    # in environments of tests/compat
    python -m benchmarks.census --only 'T5|Bart' --out /tmp/census
    python -m benchmarks.census --all                        # those without a tie as well

Each class is built tiny from its own default configuration and filled with random values, so that the bytes of a file
tell which tensor is which. After each load every tensor that the file holds is compared with the file, every buffer
that no file holds with a model that was built and not loaded, and the truth about every member of every tie and every
row of the report is read from both. Memory is filled with NaN before it is handed out, so that what nobody wrote to
shows; that two names are one tensor is read from what happens to one when the other is written to. tiedquiet's verdict,
its cause and what was printed are held against all that. Beside it stand two simpler rules: drop every row that
`_tied_weights_keys` covers, and drop every row whose tensor `is` that of another name.
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from benchmarks import tiny_models
from benchmarks.census.loads import census_of_module
from benchmarks.census.report import COLUMNS, COUNTED, cells, row, summarise, table
from benchmarks.record import arguments, pins_of, stop, write

ROOT = Path(__file__).parents[2]


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument(
        "release",
        nargs="*",
        help="releases of transformers that tests/compat has an environment for (default: this one)",
    )
    parser.add_argument("--only", default="", metavar="REGEX", help="only classes whose name has a match")
    parser.add_argument("--all", action="store_true", help="every class, whether it has a tie or not")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on with the lines that --out already has")
    options = parser.parse_args()
    try:
        re.compile(options.only)
    except re.error as error:
        stop(f"--only {options.only!r} is no regular expression: {error}")
    if options.jobs < 1:
        stop("--jobs is at least 1")
    if options.release:
        return in_environments(options)
    os.environ["HF_HUB_OFFLINE"] = "1"  # some default configurations ask the hub for a backbone
    import transformers
    from tqdm import tqdm

    options.out.mkdir(parents=True, exist_ok=True)
    lines = options.out / f"census-{transformers.__version__}.jsonl"
    done: set[str] = set()
    if options.resume and lines.exists():
        # A class is written at once, but an interrupted run may have cut its last line.
        whole = [line for line in lines.read_text().splitlines(keepends=True) if line.endswith("}\n")]
        lines.write_text("".join(whole))
        done = {json.loads(line)["class"] for line in whole}
    else:
        lines.write_text("")
    started = time.perf_counter()
    modules = tiny_models.modules_with_ties(options.only, *([""] if options.all else []))
    with ProcessPoolExecutor(options.jobs, initializer=prepare) as pool, lines.open("a") as file:
        futures = [pool.submit(census_of_module, module, options.only, done, options.all) for module in modules]
        for future in tqdm(as_completed(futures), total=len(futures), unit="module"):
            for line in future.result():
                file.write(json.dumps(line) + "\n")
            file.flush()
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    summary = summarise(records)
    # Processor time says what it takes on an idle machine, however busy this one is.
    own, theirs = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    configuration = {
        "only": options.only,
        "all": options.all,
        "jobs": options.jobs,
        "resumed": bool(done),  # then the times are of the last part alone
        "seconds": round(time.perf_counter() - started),
        "processor_seconds": round(own.ru_utime + own.ru_stime + theirs.ru_utime + theirs.ru_stime),
    }
    theme = "census-all" if options.all else "census"
    path = write(f"{theme}-{transformers.__version__}", configuration, summary, options.out)
    path.with_suffix(".md").write_text(table(transformers.__version__, summary, records))
    print(row(["transformers", *COLUMNS.values()]), row(["---", *["---:"] * len(COLUMNS)]), sep="\n")
    print(row([transformers.__version__, *cells(summary["total"])]))
    print(path.with_suffix(".md"), file=sys.stderr)
    return 1 if any(summary["total"][what] for what in COUNTED) else 0


def in_environments(options: argparse.Namespace) -> int:
    from tests.compat.__main__ import python_of

    pins_of(options.release)
    worst, head = 0, 2
    for release in options.release:
        command = [python_of(release), "-m", "benchmarks.census", "--only", options.only, "--jobs", str(options.jobs)]
        command += ["--out", str(options.out.absolute()), *(["--resume"] if options.resume else [])]
        command += ["--all"] if options.all else []
        done = subprocess.run(command, cwd=ROOT, check=False, stdout=subprocess.PIPE, text=True)
        worst = max(worst, abs(done.returncode))
        print("\n".join(done.stdout.splitlines()[2 - head :]), flush=True)
        head = 0
    return worst


def prepare() -> None:
    """Make a worker quiet and single-threaded."""
    warnings.simplefilter("ignore")
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()  # what building odd configurations says; a load is overheard


if __name__ == "__main__":
    sys.exit(main())
