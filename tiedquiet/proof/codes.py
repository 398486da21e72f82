"""Codes of quantisers: whole numbers or numbers of eight bits, which say nothing without their scale."""

from collections.abc import Iterable

import torch

from tiedquiet.verdict import Finding, Verdict

CODES = tuple(t for name in ("int8", "uint8", "float8_e4m3fn", "float8_e5m2") if (t := getattr(torch, name, None)))


class Scales:
    """Which tensors that nothing read may be the scale of a module's codes.

    Args:
        unread: names of the files that nothing read.
    """

    def __init__(self, unread: Iterable[str]) -> None:
        self._inside: dict[str, str] = {}
        self._scales: dict[str, str] = {}
        for name in sorted(unread):
            for place in (place for place, sign in enumerate(name) if sign in "._"):
                module, rest = name[:place], name[place:]
                if rest[0] == ".":
                    self._inside.setdefault(module, name)
                if "scale" in rest and rest.count(".") <= 2:
                    self._scales.setdefault(module, name)
            first, _, rest = name.partition(".")
            if "scale" in first:  # all scales are kept in one place, under the names of modules or of their codes
                self._scales.setdefault(rest, name)
                self._scales.setdefault(rest.rpartition(".")[0], name)

    def of(self, name: str, dtype: torch.dtype) -> str | None:
        """The scale of a tensor: by its own name; or, of what has the type of codes, anything of the same module."""
        module = name.rpartition(".")[0]
        if not module:
            return None
        return self._scales.get(module) or (self._inside.get(module) if dtype in CODES else None)


def without_scale(key: str, name: str, stored: torch.dtype, ours: torch.dtype, scales: Scales) -> Finding | None:
    """A finding where codes were read as numbers, and nothing read the scale beside them.

    Args:
        key: the model's name.
        name: the file's.
        stored: the type that it has in the file.
        ours: the type that it was read into.
        scales: what nothing read; a scale is of the same module, or has its name (`down_proj_scale`).
    """
    is_codes = stored in CODES or not (stored.is_floating_point or stored.is_complex or stored is torch.bool)
    if not is_codes or ours in CODES or not ours.is_floating_point or (scale := scales.of(name, stored)) is None:
        return None
    why = f"{str(stored).removeprefix('torch.')} codes were read as values, without {scale}"
    return Finding(key, Verdict.UNREAD, None, why, True, "Load it with the quantization_config that it was saved with")
