"""A model's config as transformers reads it, and what a stranger's must not ask for."""

from collections.abc import Callable
from typing import Any

from tiedquiet.gate.bounds import check_size
from tiedquiet.gate.patterns import ENDLESS, endless
from tiedquiet.gate.refusal import CannotCheck
from tiedquiet.gate.source import kernels, under


def as_read(
    label: str, config: dict[str, Any], read: Callable[[str], dict[str, Any] | None], trust: bool
) -> dict[str, Any]:
    """What transformers takes for the config: `configuration_files` in it may lead to another file.

    Args:
        label: how a line about the model begins.
        config: what config.json holds.
        read: reads a file beside it; None where there is none.
        trust: whether code that it names may run.

    Raises:
        CannotCheck: there is none, or it asks for what it must not.
    """
    _check(label, "config.json", config, trust)
    if (file := _of_release(label, config)) == "config.json":
        return config
    if (other := read(file)) is None:
        raise CannotCheck(f"{label}: config.json names {file}, which is missing")
    _check(label, file, other, trust)
    return other


def _of_release(label: str, config: dict[str, Any]) -> str:
    """The name of the file for the installed release, of those that a config has for several."""
    from transformers.configuration_utils import get_configuration_file

    try:
        return str(get_configuration_file(config.get("configuration_files", [])))
    except Exception as error:
        why = " ".join(str(error).split())
        raise CannotCheck(f"{label}: `configuration_files` in config.json cannot be read: {why}") from error


def _check(label: str, file: str, config: dict[str, Any], trust: bool) -> None:
    check_size(label, file, config)
    if trust:
        return
    if any(under(config, "attribute_map")):
        raise CannotCheck(
            f"{label}: {file} has an attribute_map, by which transformers takes one name in it for another; "
            "--trust-remote-code allows it"
        )
    if (kernel := next(kernels(config), None)) is not None:
        raise CannotCheck(
            f"{label}: {file} names {kernel}, compiled code that transformers fetches from the hub and runs; "
            "--trust-remote-code allows it"
        )
    if pattern := endless(under(config, "quantization_config")):
        raise CannotCheck(f"{label}: the quantization_config in {file} {ENDLESS.format(pattern)}")
