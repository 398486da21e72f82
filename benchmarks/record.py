"""What every benchmark shares: the description of where it ran, and its result files."""

import json
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("tiedquiet", "transformers", "torch", "wrapt", "safetensors", "huggingface_hub", "accelerate", "diffusers")


def stop(message: str) -> NoReturn:
    """End with one line and exit status 2: the input cannot be used."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
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
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)
    return path


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
