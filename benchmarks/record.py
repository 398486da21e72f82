"""What every benchmark shares: the description of where it ran, and its result files.

`python -m benchmarks.record` lays out the results that are there already.
"""

import argparse
import json
import logging
import os
import platform
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn, TypeVar

_T = TypeVar("_T")
RESULTS = Path(__file__).parent / "results"
# A page shows a plot some 700 pixels wide: letters of 10 points are 12 pixels high there if the plot is this wide.
PAGE_INCHES = 7.6
PACKAGES = ("tiedquiet", "transformers", "torch", "wrapt", "safetensors", "huggingface_hub", "accelerate", "diffusers")


def arguments(doc: str) -> argparse.ArgumentParser:
    """The command line that every benchmark has: its docstring as help, and `--out`."""
    first, *rest = doc.splitlines()
    parser = argparse.ArgumentParser(
        prog=program(), description=first, epilog="\n".join(rest), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results go (default: benchmarks/results)")
    return parser


def pins_of(releases: Sequence[str]) -> dict[str, list[str]]:
    """What tests/compat installs along with each of these releases of transformers; stops at one it does not know."""
    from tests.compat.__main__ import RELEASES

    if unknown := [release for release in releases if release not in RELEASES]:
        stop(f"no environment for transformers {', '.join(unknown)}; known: {', '.join(RELEASES)}")
    return {release: RELEASES[release] for release in releases}


def program() -> str:
    """The name of the script, or of the folder that is run as a module."""
    path = Path(sys.argv[0])
    return path.parent.name if path.name == "__main__.py" else path.name


def stop(message: str) -> NoReturn:
    """End with one line and exit status 2: the input cannot be used."""
    print(f"{program()}: {message}", file=sys.stderr)
    raise SystemExit(2)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if "tiedquiet" not in found:
        import tiedquiet

        found["tiedquiet"] = tiedquiet.__version__
    return found


def hardware() -> str:
    """The GPU where one is in use, else the processor and the number of cores that this process may use."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return str(torch.cuda.get_device_name(0))
    return processor()


def processor() -> str:
    """The processor, and the number of cores that this process may use."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        name = names[0] if names else name
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def write(theme: str, configuration: dict[str, Any], results: Any, out: Path, where: str | None = None) -> Path:
    """Write `theme_hardware_date.json` into `out`; returns its path, for the plot beside it."""
    where = where or hardware()
    short = "".join(c if c.isalnum() else "-" for c in where.lower().replace("nvidia ", "")).strip("-")
    while "--" in short:
        short = short.replace("--", "-")
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{theme}_{short[:40].strip('-')}_{date.today().isoformat()}.json"
    content = {
        "theme": theme,
        "date": date.today().isoformat(),
        "hardware": where,
        "platform": platform.platform(),
        "versions": versions(),
        "configuration": configuration,
        "results": results,
    }
    temporary = path.with_suffix(".part")
    temporary.write_text(laid_out(content) + "\n")
    temporary.replace(path)
    return path


def laid_out(value: Any, indent: int = 0, is_row: bool = False) -> str:
    """JSON that a diff can show: a line for each row of a table, and for whatever is short."""
    flat = json.dumps(value)
    items = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    is_row = is_row or not any(isinstance(item, (dict, list)) and item for item in items)
    if not items or len(flat) + indent <= (800 if is_row else 200):
        return flat
    inside = " " * (indent + 1)
    parts = [laid_out(item, indent + 1, isinstance(value, list)) for item in items]
    if isinstance(value, dict):
        parts = [f"{json.dumps(key)}: {part}" for key, part in zip(value, parts, strict=True)]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return opening + "\n" + ",\n".join(inside + part for part in parts) + "\n" + " " * indent + closing


def turned(arms: Iterable[_T], number: int) -> list[_T]:
    """The arms in the order of a round: each begins with another."""
    all_of = list(arms)
    turn = number % len(all_of)
    return all_of[turn:] + all_of[:turn]


@contextmanager
def unseen() -> Iterator[None]:
    """Send what is printed nowhere: to write it is a part of the cost, to read it is not."""
    handler = logging.getLogger("transformers").handlers[0]
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        terminal = handler.setStream(nowhere)  # type: ignore[attr-defined]
        try:
            yield
        finally:
            handler.setStream(terminal)  # type: ignore[attr-defined]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def show(values: dict[str, float], scale: float = 1, digits: int = 3) -> str:
    """A spread as `median (min to max)`, each times `scale`."""
    return "{:.{d}f} ({:.{d}f} to {:.{d}f})".format(*(scale * values[k] for k in ("median", "min", "max")), d=digits)


if __name__ == "__main__":
    for each in RESULTS.glob("*.json"):
        each.write_text(laid_out(json.loads(each.read_text())) + "\n")
