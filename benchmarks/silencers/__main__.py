"""What each way of silencing the loading report hides, what it leaves, and what each guard against corruption notices.

    python -m benchmarks.silencers                  # five releases of transformers, in the environments of tests/compat
    python -m benchmarks.silencers 5.2.0 5.24.0
    python -m benchmarks.silencers --draw           # tables and plots anew, from the newest result

Every way meets every situation, with tiny checkpoints and the real loader. What is true of a key is read from the
bytes of the file, after the load, and from a model that was built and not loaded. A cell of the first table is `right`
only if no row is left that is false and none is hidden that is true. A row counts as shown if transformers' report or
list has it, or if a warning or an error names its key. A cell of the second table is `right` only if a model that does
not hold what its file stores is noticed, and one that does is not.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.record import arguments, pins_of, stop, write
from benchmarks.silencers import picture, tables

ROOT = Path(__file__).parents[2]
RELEASES = ("5.0.0", "5.2.0", "5.3.0", "5.13.1", "5.24.0")


def main() -> int:
    parser = arguments(__doc__ or "")
    parser.prog = "python -m benchmarks.silencers"
    parser.add_argument("release", nargs="*", help=f"default: {' '.join(RELEASES)}")
    parser.add_argument("--here", action="store_true", help="only the transformers of this interpreter; prints JSON")
    parser.add_argument("--draw", action="store_true", help="measure nothing: tables and plots of the newest result")
    options = parser.parse_args()
    if options.here:
        from benchmarks.silencers import corruption, report

        json.dump({"report": report.cells(), "corruption": corruption.cells()}, sys.stdout)  # the parent reads it
        return 0
    if options.draw:
        paths = sorted(options.out.glob("silencers_*.json"), key=lambda path: path.stem[-10:])
        draw(paths[-1] if paths else stop(f"no result in {options.out}"))
        return 0

    chosen = options.release or list(RELEASES)
    pins = pins_of(chosen)
    from tqdm import tqdm

    from tests.compat.__main__ import python_of

    results = {}
    environment = {**os.environ, "TIEDQUIET": "0", "HF_HUB_OFFLINE": "1"}
    for release in tqdm(chosen, unit="release"):
        command = [python_of(release), "-m", "benchmarks.silencers", "--here"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            return 1
        results[release] = json.loads(done.stdout)
    path = write("silencers", {"releases": pins}, tables.rows(results), options.out)
    draw(path)
    print(tables.overview(tables.read(path)))
    print(path)
    return 0


def draw(path: Path) -> None:
    """Write the tables and the two plots beside a result."""
    results = tables.read(path)
    path.with_suffix(".md").write_text(tables.page(results))
    picture.plot(path, results)


if __name__ == "__main__":
    sys.exit(main())
