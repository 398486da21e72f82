"""The command line: `tiedquiet check PATH|HUB_ID`, `info` and `demo`."""

import sys

from tiedquiet import mode

if mode.is_run_as_module() and not getattr(sys.flags, "safe_path", sys.flags.isolated) and __name__ == "__main__":
    del sys.path[0]  # the current folder, which may be that of strangers: from here on no module comes from it

import argparse
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from types import FrameType
from typing import NoReturn

import tiedquiet
from tiedquiet.gate import command as gate
from tiedquiet.gate import report
from tiedquiet.gate.printing import coloured, prepare, printable
from tiedquiet.gate.refusal import CannotCheck

TESTED = "5.0.0 to 5.24.0"  # releases of transformers; tests/compat has the list


class _Misused(Exception):
    """The command line is wrong; the message says how."""


class _Printed(SystemExit):
    """Help or the version, which was asked for, is printed."""


class _Parser(argparse.ArgumentParser):
    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        raise _Printed(status)

    def error(self, message: str) -> NoReturn:
        raise _Misused(f"{message}; see {self.prog} --help")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 no problems, 1 problems found, 2 cannot check: whatever happened, one line on stderr says why.

    Raises:
        SystemExit: help or the version was asked for, and printed; its status is 0.
    """
    given = sys.argv[1:] if arguments is None else arguments
    options = argparse.Namespace()
    prepare(sys.stdout, sys.stderr)
    with _interrupts() as interrupts:
        try:
            status = _main(given, options)
            if sys.stdout is not None:
                sys.stdout.flush()
            return status
        except (CannotCheck, _Misused) as error:
            reason = str(error)
        except ImportError as error:
            reason = f"{error}; to install it: python -m pip install transformers torch accelerate"
        except BrokenPipeError:
            reason = "the output was closed before all of it was written"
        except KeyboardInterrupt:
            reason = "interrupted"
        except _Printed:
            raise
        except SystemExit as stop:  # that of code which was let run is no status of ours, least of all 0
            of_code = f"code that was run ended the program, with status {stop.code}"
            reason = stop.code.removeprefix("tiedquiet: ") if isinstance(stop.code, str) else of_code
        except OSError as error:
            reason = f"the operating system says: {error}"
        except Exception as error:
            reason = f"internal error, please report it: {type(error).__name__}: {error}"
        return _fail("interrupted" if interrupts else reason, given, options)


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """The interrupts that came meanwhile: in the middle of an import, Ctrl-C may surface as any other error."""
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        signal.default_int_handler(number, frame)

    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with suppress(ValueError):  # in another thread there are no signals
        if ours:
            signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        with suppress(ValueError):
            if ours:
                signal.signal(signal.SIGINT, signal.default_int_handler)


def _main(arguments: list[str], options: argparse.Namespace) -> int:
    parser = _Parser(
        prog="tiedquiet", description="Proves that a loaded model holds what its checkpoint stored.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"tiedquiet {tiedquiet.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="check|info|demo")
    check = commands.add_parser(
        "check",
        help="load a checkpoint and say whether the model holds what it stores",
        description="Load a checkpoint with transformers, or each model of a diffusers pipeline, and compare every "
        "tensor with the checkpoint's own files. Exit status: 0 no problems, 1 problems found, 2 cannot check.",
        allow_abbrev=False,
    )
    gate.add_arguments(check)
    commands.add_parser(
        "info",
        help="show versions, the mode, and what is wrapped",
        description="Show which versions are installed, which mode is in force, and which functions of transformers "
        "are wrapped. Exit status: 0 all of them are wrapped as expected, 1 not all, 2 transformers is missing.",
    )
    commands.add_parser("demo", help="show before and after on tiny checkpoints in a temporary folder")
    parser.parse_args(arguments, options)
    if sys.flags.optimize > 1:
        raise _Misused("transformers makes its classes from docstrings, and python -OO drops these; use python -O")
    try:
        mode.from_environment()
    except ValueError as error:
        if options.command != "info":
            raise _Misused(str(error)) from error
        return _info(str(error))
    if options.command == "demo":
        from tiedquiet.demo import demo

        demo()
        return 0
    return _info() if options.command == "info" else gate.check(options)


def _fail(reason: str, given: list[str], options: argparse.Namespace) -> int:
    """Say in one line why nothing was checked; for machines in JSON as well."""
    try:
        if given[:1] == ["check"] and "--json" in given:
            first = next((word for word in given[1:] if not word.startswith("-")), "")  # of a line that is wrong
            print(report.as_json(2, getattr(options, "source", first), gate.versions(), [], reason))
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):  # nobody reads it, or the disk is full: Python must not try again at exit
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (it stays open)
    try:
        print(f"{coloured('tiedquiet', 'red', sys.stderr)}: {printable(reason)}", file=sys.stderr, flush=True)
    except (OSError, ValueError):  # `2>&1 | head -1`: as above, and 1 would mean that something was checked
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (it stays open)
    return 2


def _info(problem: str = "") -> int:
    # Without these no model is loaded, and nothing is wrapped before they are imported.
    for name in ("transformers.modeling_utils", "transformers.trainer"):
        import_module(name)
    with suppress(ImportError):
        import_module("peft.peft_model")
    from tiedquiet.doors import wrapping

    for package, version in gate.versions().items():
        print(f"{package} {version or '(not installed)'}")
    print(f"mode: {problem or f'{(now := mode.setting()).mode} ({now.origin})'}")
    print(f"tested with transformers {TESTED}")
    if reason := wrapping.inert_because():
        print(reason)
        return 1
    states = wrapping.states()
    for name, state, _ in states:
        print(f"{name}: {state}")
    return int(bool(problem) or (mode.current() != "off" and not all(well for _, _, well in states)))


if __name__ == "__main__":
    sys.exit(main())
