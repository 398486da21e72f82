"""Codes of quantisers: whole numbers or numbers of eight bits, which say nothing without their scale."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator

import torch

from tiedquiet.verdict import Finding, Verdict

CODES = tuple(t for name in ("int8", "uint8", "float8_e4m3fn", "float8_e5m2") if (t := getattr(torch, name, None)))


def is_whole(dtype: torch.dtype) -> bool:
    """Whether a type is one of whole numbers."""
    return not (dtype.is_floating_point or dtype.is_complex or dtype is torch.bool)


def is_coded_matrix(stored: torch.dtype, ours: torch.Tensor) -> bool:
    """Whether a matrix of weights is stored as whole numbers: without a scale, none was trained that has these values.

    Those of a vector or a mask may be meant, and float8 may be the numbers themselves.
    """
    is_matrix = isinstance(ours, torch.nn.Parameter) and ours.dim() > 1 and ours.is_floating_point()
    return is_whole(stored) and is_matrix


class Scales:
    """Which tensors that nothing read may be the scale of a module's codes.

    Args:
        unread: names of the files that nothing read.
    """

    def __init__(self, unread: Iterable[str]) -> None:
        self._names = sorted(unread)
        self._apart: dict[str, str] = {}
        for name in self._names:
            first, _, rest = name.partition(".")
            if "scale" in first:  # all scales are kept in one place, under the names of modules or of their codes
                self._apart.setdefault(rest, name)
                self._apart.setdefault(rest.rpartition(".")[0], name)

    def of(self, name: str, dtype: torch.dtype) -> str | None:
        """The scale of a tensor: by its own name; or, of what has the type of codes, anything of the same module."""
        module = name.rpartition(".")[0]
        if not module:
            return None
        beside = list(self._beside(module))
        scales = [n for n, end in beside if end[0] in "._" and "scale" in end and end.count(".") <= 2]
        scales.sort(key=lambda scale: not scale.startswith(name))  # `weight_scale` before `input_scale`
        inside = (n for n, end in beside if end[0] == "." and dtype in CODES)
        return next(iter(scales), None) or self._apart.get(module) or next(inside, None)

    def _beside(self, module: str) -> Iterator[tuple[str, str]]:
        """The names that begin as a module does, and what follows there."""
        # Found when it is asked for: a stranger's name may have a million parts, and each may be where a module ends.
        for place in range(bisect_right(self._names, module), len(self._names)):
            if not (name := self._names[place]).startswith(module):
                return
            yield name, name[len(module) :]


def without_scale(key: str, name: str, stored: torch.dtype, ours: torch.Tensor, scales: Scales) -> Finding | None:
    """A finding where codes were read as numbers, and nothing read the scale beside them, or there is none.

    Args:
        key: the model's name.
        name: the file's.
        stored: the type that it has in the file.
        ours: the tensor that it was read into.
        scales: what nothing read; a scale is of the same module, or has its name (`down_proj_scale`).
    """
    is_codes = stored in CODES or is_whole(stored)
    if not is_codes or ours.dtype in CODES or not ours.is_floating_point():
        return None
    if (scale := scales.of(name, stored)) is None and not is_coded_matrix(stored, ours):
        return None
    without = f"without {scale}" if scale else "and the checkpoint has no scale beside them"
    why = f"{str(stored).removeprefix('torch.')} codes were read as values, {without}"
    return Finding(key, Verdict.UNREAD, None, why, True, "Load it with the quantization_config that it was saved with")
