"""The command line: `python -m tiedquiet check PATH` and `python -m tiedquiet demo`."""

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import tiedquiet
from tiedquiet import patch
from tiedquiet.proof import Verdict
from tiedquiet.report import log


class _Cannot(Exception):
    """Something cannot be loaded; the message is one line for the user."""


class _Component(NamedTuple):
    """A model of the folder, and what its load left open besides ties."""

    name: str
    cls: str
    ties: list[tiedquiet.Tie]
    missing: list[str]

    @property
    def is_loud(self) -> bool:
        return bool(self.missing) or any(tie.verdict is not Verdict.TIED for tie in self.ties)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; 0 all well, 1 something is loud, 2 it cannot be loaded or the call is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tiedquiet", description=tiedquiet.__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=f"tiedquiet {tiedquiet.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="check|demo")
    check = commands.add_parser(
        "check",
        help="load a checkpoint folder and judge its ties",
        description="Load a transformers folder, or each transformers model of a diffusers pipeline folder, and judge "
        "its ties. Exit status: 0 all well, 1 something is loud, 2 it cannot be loaded.",
    )
    check.add_argument("path", type=Path, metavar="PATH", help="folder with config.json or model_index.json")
    check.add_argument("--device", default="cpu", help="where to load it: cpu (default), cuda, cuda:1, ...")
    check.add_argument("--json", action="store_true", help="print JSON for machines instead of a table")
    check.add_argument("--trust-remote-code", action="store_true", help="allow modelling code that lies in the folder")
    commands.add_parser("demo", help="show before and after on tiny checkpoints in a temporary folder")
    options = parser.parse_args(arguments)
    try:
        if options.command == "demo":
            from tiedquiet.demo import demo

            demo()
            return 0
        return _check(options)
    except _Cannot as error:
        print(f"tiedquiet: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"tiedquiet: {error}; python -m pip install 'tiedquiet[demo]' brings what is needed", file=sys.stderr)
        return 2


def _check(options: argparse.Namespace) -> int:
    import transformers

    if reason := patch.inert_because():
        raise _Cannot(reason)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    log.setLevel(logging.CRITICAL)  # the table says it all
    with tiedquiet.enable("on"):
        components = list(_load(options.path, options.device, options.trust_remote_code))
    if options.json:
        print(json.dumps([_as_json(component) for component in components], indent=2))
    else:
        print(_as_table(components))
    return int(any(component.is_loud for component in components))


def _load(path: Path, device: str, trust: bool) -> Iterator[_Component]:
    if not path.is_dir():
        raise _Cannot(f"{path} is not a folder")
    if (path / "model_index.json").is_file():
        index = _read(path / "model_index.json")
        names = [name for name, entry in index.items() if isinstance(entry, list) and "transformers" in entry[:1]]
        found = [name for name in names if (path / name / "config.json").is_file()]
        if not found:
            raise _Cannot(f"{path / 'model_index.json'} names no transformers model that lies in the folder")
        for name in found:
            yield _load_one(path / name, name, index[name][1], device, trust)
    elif (path / "config.json").is_file():
        architectures = _read(path / "config.json").get("architectures") or [None]
        yield _load_one(path, ".", architectures[0], device, trust)
    else:
        raise _Cannot(f"{path} has neither config.json nor model_index.json")


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _Cannot(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise _Cannot(f"{path} holds no JSON object")
    return content


def _load_one(path: Path, name: str, cls: str | None, device: str, trust: bool) -> _Component:
    import transformers

    loader = getattr(transformers, cls or "AutoModel", None) or transformers.AutoModel
    try:
        model, info = loader.from_pretrained(
            path, dtype="auto", device_map=device, output_loading_info=True, trust_remote_code=trust
        )
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise _Cannot(f"{path} cannot be loaded as {cls or 'AutoModel'}: {first}") from error
    ties = tiedquiet.check(model)
    judged = {tie.key for tie in ties}
    return _Component(name, type(model).__name__, ties, sorted(set(info["missing_keys"]) - judged))


def _as_json(component: _Component) -> dict[str, Any]:
    return {
        "component": component.name,
        "class": component.cls,
        "loud": component.is_loud,
        "ties": [asdict(tie) for tie in component.ties],
        "missing": component.missing,
    }


def _as_table(components: list[_Component]) -> str:
    rows = [("component", "class", "key", "source", "verdict", "declared")]
    for component in components:
        rows += [
            (component.name, component.cls, t.key, t.source or "-", t.verdict.value, "yes" if t.declared else "no")
            for t in component.ties
        ]
        rows += [(component.name, component.cls, key, "-", "missing", "no") for key in component.missing]
        if not component.ties and not component.missing:
            rows.append((component.name, component.cls, "(all tensors stored)", "-", "-", "-"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "-+-".join("-" * width for width in widths))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
