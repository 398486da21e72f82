"""The command line: `python -m tiedquiet check PATH|HUB_ID`, `info` and `demo`."""

import argparse
import sys
from contextlib import suppress
from importlib import import_module

import tiedquiet
from tiedquiet import mode
from tiedquiet.gate import command as gate
from tiedquiet.gate.diagnosis import CannotCheck

TESTED = "5.0.0 to 5.24.0"  # releases of transformers; tests/compat has the list


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; 0 all well, 1 something is loud, 2 it cannot be loaded or the call is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tiedquiet", description=tiedquiet.__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=f"tiedquiet {tiedquiet.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="check|info|demo")
    check = commands.add_parser(
        "check",
        help="load a checkpoint and say whether the model holds what it stores",
        description="Load a checkpoint with transformers, or each transformers model of a diffusers pipeline, and hold "
        "every tensor of the model against the checkpoint's own files. Exit status: 0 all is well, 1 something is not, "
        "2 it cannot be loaded.",
    )
    gate.add_arguments(check)
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
        return _info() if options.command == "info" else gate.check(options)
    except CannotCheck as error:
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
    with suppress(ImportError):
        import_module("peft.peft_model")
    from tiedquiet.doors import wrapping

    for package, version in gate.versions().items():
        print(f"{package} {version or '(not installed)'}")
    print(f"mode: {(now := mode.setting()).mode} ({now.origin})")
    print(f"tested with transformers {TESTED}")
    if reason := wrapping.inert_because():
        print(reason)
        return 1
    states = wrapping.states()
    for name, state, _ in states:
        print(f"{name}: {state}")
    return int(mode.current() != "off" and not all(well for _, _, well in states))


if __name__ == "__main__":
    sys.exit(main())
