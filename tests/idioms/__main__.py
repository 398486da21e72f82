"""`python -m tests.idioms [RELEASE ...]`: a table of idioms and releases.

It has what transformers printed, what tiedquiet says, and what is true.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers

import tiedquiet
from tests.checkpoints import printing
from tests.idioms.reference import outputs_agree
from tests.idioms.tiny import IDIOMS, Idiom, Tiny
from tests.idioms.truths import dirty_memory, truth

RELEASES = ("5.0.0", "5.2.0", "5.3.0", "5.13.1", "5.24.0")


def described(model: "Tiny", idiom: Idiom, file: Mapping[str, torch.Tensor]) -> str:
    """The truth in a few words, for the table."""
    reference = idiom.build()
    found = truth(model, file, reference, idiom.architectures)
    on_meta = {key for key in found.unwritten if model.get_parameter_or_buffer(key).is_meta}
    together = found.shared.keys() | found.drowned.keys() | found.equal.keys()
    parts = []
    for words, keys in (
        ("lost", found.lost - found.rivals),
        ("one of two kept", found.rivals),
        ("garbage", found.unwritten - on_meta),
        ("left on meta", on_meta),
        ("shared", found.shared.keys()),
        ("shared with what is lost", found.drowned.keys()),
        ("equal", found.equal.keys() & found.ties.keys()),
        ("other values", {key for key, ends in found.ties.items() if ends} - together - on_meta),
    ):
        if keys:
            parts.append(f"{words}: {', '.join(sorted(keys))}")
    return "; ".join(parts) or "all right"


def outcome(name: str) -> dict[str, str]:
    """One row of the table, on the release that runs this."""
    idiom = IDIOMS[name]
    with tempfile.TemporaryDirectory() as folder, dirty_memory():
        file = idiom.save(Path(folder))
        with tiedquiet.enable("off"), printing() as printed:
            model, missing = idiom.load(Path(folder))
        rows = sorted(key for key in missing if printed.shows(key))
        true = described(model, idiom, file)
        with tiedquiet.enable("on"), printing() as printed:
            model, missing = idiom.load(Path(folder))
        said: dict[str, list[str]] = defaultdict(list)
        for finding in tiedquiet.check(model).findings:
            said[str(finding.verdict.value)].append(finding.key)
        kept = sorted(key for key in missing if printed.shows(key))
        with tiedquiet.enable("repair"):
            model, _ = idiom.load(Path(folder))
        found = truth(model, file, idiom.build(), idiom.architectures)
        left = found.lost | found.unwritten | found.wrong
        right = not left and outputs_agree(idiom, model, file)
    after = "right" if right else f"wrong: {', '.join(sorted(left)) or 'outputs'}"
    return {
        "rows": ", ".join(rows) or "nothing",
        "kept": ", ".join(kept) or "nothing",
        "says": "; ".join(f"{verdict}: {', '.join(sorted(keys))}" for verdict, keys in said.items()) or "nothing",
        "true": true,
        "after": after,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.idioms", description="Load every idiom on each release; print a table."
    )
    parser.add_argument("release", nargs="*", help=f"default: {', '.join(RELEASES)}")
    parser.add_argument("--here", action="store_true", help="only the release that is installed, as JSON lines")
    arguments = parser.parse_args()
    if arguments.here:
        transformers.utils.logging.disable_progress_bar()
        for name in IDIOMS:
            print(json.dumps({"name": name, **outcome(name)}), flush=True)
        return 0
    from tests.compat.__main__ import ROOT, python_of

    table: dict[str, dict[str, dict[str, str]]] = {name: {} for name in IDIOMS}
    for release in arguments.release or RELEASES:
        command = [python_of(release), "-m", "tests.idioms", "--here"]
        environment = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            print(done.stderr[-4000:], file=sys.stderr)
            return 1
        for line in done.stdout.splitlines():
            row = json.loads(line)
            table[row.pop("name")][release] = row
    print("| idiom | transformers | MISSING rows | with tiedquiet | it says | what is true | after `repair` |")
    print("|" + " --- |" * 7)
    for name, rows in table.items():
        # Releases that agree in everything share a line.
        counted: dict[str, list[str]] = defaultdict(list)
        for release, row in rows.items():
            counted[" | ".join(row[cell] for cell in ("rows", "kept", "says", "true", "after"))].append(release)
        for cells, releases in counted.items():
            print(f"| {name} | {', '.join(releases)} | {cells} |")
    wrong = Counter(release for rows in table.values() for release, row in rows.items() if row["after"] != "right")
    print(f"\nNot right after `repair`: {dict(wrong) or 'none'}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
