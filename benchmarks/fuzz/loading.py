"""One load in one mode: what it gave, what it said, and how it ended."""

import copy
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import tiedquiet
from benchmarks.fuzz.classes import FuzzConfig, make
from benchmarks.fuzz.draw import keys_of
from benchmarks.fuzz.files import Files
from benchmarks.fuzz.plan import Plan
from tests.checkpoints import Printed
from tiedquiet import LoadError, Proof


class Overheard(Printed):
    """What both libraries log."""

    def rows(self) -> set[str]:
        """The keys that the report calls missing."""
        report = "\n".join(r.getMessage() for r in self.records if r.name.startswith("transformers"))
        return {line.split("|")[0].strip() for line in report.splitlines() if "| MISSING" in line}

    def fell_aside(self) -> str:
        said = [r.getMessage() for r in self.records if r.name.startswith("tiedquiet")]
        return next((line for line in said if line.startswith("tiedquiet failed")), "")


@contextmanager
def overheard() -> Iterator[Overheard]:
    handler = Overheard()
    loggers = [logging.getLogger(name) for name in ("transformers", "tiedquiet")]
    before = [(logger.handlers, logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
    try:
        yield handler
    finally:
        for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)


class Loaded:
    """A load.

    Attributes:
        model: what it gave; None where it raised.
        proof: what tiedquiet says of it.
        error: what it raised.
        missing: what transformers calls missing to its caller.
        rows: what its report shows as missing.
        fell_aside: what was said where tiedquiet failed.
    """

    def __init__(self, plan: Plan, files: Files, mode: str, scratch: Path) -> None:
        self.model: Any = None
        self.proof: Proof | None = None
        self.error: Exception | None = None
        self.missing: set[str] = set()
        cls = make(plan.shape, plan.writes)
        cls.live = True
        torch.manual_seed(plan.seed)
        random.seed(plan.seed)
        with tiedquiet.enable(mode), overheard() as heard, dirty_memory():
            try:
                self.model, info = cls.from_pretrained(
                    None if plan.way.state_dict else files.folder,
                    output_loading_info=True,
                    **_arguments(plan, files, scratch),
                )
                self.missing = set(info["missing_keys"])
                if mode != "off":
                    self.proof = tiedquiet.check(self.model)
            except Exception as error:
                self.error = error
        cls.live = False
        self.rows = heard.rows()
        self.fell_aside = heard.fell_aside()

    @property
    def raised(self) -> bool:
        return isinstance(self.error, LoadError)


def _arguments(plan: Plan, files: Files, scratch: Path) -> dict[str, Any]:
    way = plan.way
    found: dict[str, Any] = {}
    if way.dtype:
        found["dtype"] = getattr(torch, way.dtype)
    if way.state_dict:
        found["config"] = FuzzConfig.from_pretrained(files.folder)
        found["state_dict"] = copy.deepcopy(files.state_dict())
    if way.device_map in ("cpu", "meta"):
        found["device_map"] = way.device_map
    elif way.device_map == "disk":
        found["device_map"] = _partly_on_disk(plan)
        found["offload_folder"] = scratch
    if way.scale is not None:
        found["scale"] = way.scale
    if way.low_memory:
        found["low_cpu_mem_usage"] = True
    return found


def _partly_on_disk(plan: Plan) -> dict[str, str]:
    """About half of the modules on disk; both ends of a tie together, as accelerate's own maps have it."""
    tops = sorted(
        {key.split(".")[0] for key in keys_of(plan.shape)} | {t.path.split(".")[0] for t in plan.shape.tables}
    )
    rng = random.Random(plan.seed)
    where = {top: rng.choice(("cpu", "disk")) for top in tops}
    for top in where.keys() & {"head", "skull"}:
        where[top] = where["emb"]
    if plan.shape.shared:
        where["second"] = where[plan.shape.shared.split(".")[0]]
    return where


@contextmanager
def dirty_memory() -> Iterator[None]:
    """Memory that nobody wrote holds NaN or the largest integer, and never what it should by accident."""
    filling: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), filling.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    filling.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        filling.fill_uninitialized_memory = before[1]
