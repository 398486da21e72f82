"""The command line: `python -m tiedquiet check PATH`, `info` and `demo`."""

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, NamedTuple

import tiedquiet
from tiedquiet import mode
from tiedquiet.verdict import WELL

TESTED = "5.0.0 to 5.24.0"  # releases of transformers; tests/compat has the list


class _Cannot(Exception):
    """Something cannot be loaded; the message is one line for the user."""


class _Component(NamedTuple):
    """A model of the folder, and which of its keys are missing for another reason than those in its proof."""

    name: str
    proof: tiedquiet.Proof
    missing: list[str]

    @property
    def is_loud(self) -> bool:
        return bool(self.missing) or any(finding.verdict not in WELL for finding in self.proof.findings)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; 0 all well, 1 something is loud, 2 it cannot be loaded or the call is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tiedquiet", description=tiedquiet.__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=f"tiedquiet {tiedquiet.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="check|info|demo")
    check = commands.add_parser(
        "check",
        help="load a checkpoint folder and say whether the model holds what it stores",
        description="Load a transformers folder, or each transformers model of a diffusers pipeline folder, and say "
        "whether the model holds what the checkpoint stores. Exit status: 0 all is well, 1 something is not, 2 it "
        "cannot be loaded.",
    )
    check.add_argument("path", type=Path, metavar="PATH", help="folder with config.json or model_index.json")
    check.add_argument("--device", default="cpu", help="where to load it: cpu (default), cuda, cuda:1, ...")
    check.add_argument("--json", action="store_true", help="print JSON for machines instead of a table")
    check.add_argument("--trust-remote-code", action="store_true", help="allow modelling code that lies in the folder")
    commands.add_parser(
        "info",
        help="say what is wrapped, in which mode",
        description="Say which versions are installed, which mode is in force, and what of transformers is wrapped. "
        "Exit status: 0 all of it is understood, 1 something is not, 2 transformers is missing.",
    )
    commands.add_parser("demo", help="show before and after on tiny checkpoints in a temporary folder")
    options = parser.parse_args(arguments)
    try:
        if options.command == "demo":
            from tiedquiet.demo import demo

            demo()
            return 0
        return _info() if options.command == "info" else _check(options)
    except _Cannot as error:
        print(f"tiedquiet: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        needed = "python -m pip install transformers torch accelerate"
        print(f"tiedquiet: {error}; {needed} brings what is needed", file=sys.stderr)
        return 2


def _info() -> int:
    # Without these no model is loaded, and nothing is wrapped before they are imported.
    for name in ("transformers.modeling_utils", "transformers.trainer"):
        import_module(name)
    from tiedquiet import patch

    for package in ("tiedquiet", "transformers", "torch", "wrapt", "diffusers", "accelerate", "peft"):
        try:
            print(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            print(f"{package} {tiedquiet.__version__ if package == 'tiedquiet' else '(not installed)'}")
    print(f"mode: {mode.current} ({mode.origin})")
    print(f"tested with transformers {TESTED}")
    if reason := patch.inert_because():
        print(reason)
        return 1
    states = patch.states()
    for name, state, _ in states:
        print(f"{name}: {state}")
    return int(mode.current != "off" and not all(well for _, _, well in states))


def _check(options: argparse.Namespace) -> int:
    import transformers

    from tiedquiet import patch
    from tiedquiet.report import log

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
    proof = tiedquiet.check(model)
    judged = {finding.key for finding in proof.findings}
    return _Component(name, proof, sorted(set(info["missing_keys"]) - judged))


def _as_json(component: _Component) -> dict[str, Any]:
    return {
        "component": component.name,
        "class": component.proof.model,
        "loud": component.is_loud,
        "stored": component.proof.stored,
        "findings": [asdict(finding) for finding in component.proof.findings],
        "missing": component.missing,
    }


def _as_table(components: list[_Component]) -> str:
    lines = []
    for component in components:
        proof = component.proof
        lines.append(f"{component.name}: {proof.model}, {proof.stored} stored tensors are held unchanged")
        rows = [(f.key, f.verdict.value, f.source or "", f.why) for f in proof.findings]
        rows += [(key, "missing", "", "not in the checkpoint") for key in component.missing]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += ["  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
