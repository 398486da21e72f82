"""From a seed to a plan. The same seed draws the same plan, whatever the release of transformers."""

import random
from typing import Any

import torch

from benchmarks.fuzz.classes import AGAIN, DECLARATIONS, DERIVED, FILLS, MOMENTS, FuzzConfig, make
from benchmarks.fuzz.plan import Part, Plan, Shape, Stored, Table, Ties, Way, Write
from benchmarks.fuzz.writes import WAYS

OVERRIDES = (
    "proper",
    "shares .data",
    "a scrambled view",
    "one row expanded",
    "transposed",
    "a slice",
    "rows backwards",
    "a clone",
    "copies",
    "nothing",
)
PARTS = (
    Part("lin", "linear", (6, 4)),
    Part("lin", "linear", (6, 4), bias=False),
    Part("square", "linear", (4, 4)),
    Part("block.lin", "linear", (4, 6)),
    Part("block.deep.lin", "linear", (3, 4)),
    Part("wte", "embedding", (7, 4), padding=0),
    Part("wte", "embedding", (7, 4), padding=6),
    Part("block.wpe", "embedding", (5, 3)),
    Part("conv", "conv1d", (2, 3, 3)),
    Part("block.conv", "conv2d", (2, 3, 4, 5)),
    Part("norm", "norm", (5,)),
    Part("block.norm", "norm", (4,)),
    Part("bare", "bare", (3, 2)),
    Part("block.bare", "bare", (4,)),
)


def plan(seed: int) -> Plan:
    """The load that a seed stands for."""
    rng = random.Random(seed)
    shape = _shape(rng)
    keys = keys_of(shape)
    stored = _stored(rng, shape, keys)
    writes = _writes(rng, shape, keys, stored)
    way = _way(rng, shape, stored)
    return Plan(seed, shape, stored, writes, way)


def keys_of(shape: Shape) -> dict[str, torch.Tensor]:
    """The state dict of a class, on meta: its names, shapes and types."""
    with torch.device("meta"):
        return dict(make(shape)(FuzzConfig()).state_dict())


def _some(rng: random.Random, *weights: int) -> int:
    """A small number: 0 as often as the first weight says, 1 as the second, and so on."""
    return rng.choices(range(len(weights)), weights)[0]


def _shape(rng: random.Random) -> Shape:
    parts: dict[str, Part] = {}
    for part in rng.sample(PARTS, 1 + _some(rng, 2, 3, 2, 1)):
        parts.setdefault(part.path, part)
    if len(parts) == 1 and "lin" not in parts:
        parts["lin"] = PARTS[0]
    tables = tuple(_table(rng, path) for path in ("rotary", "block.mask")[: _some(rng, 4, 4, 1)])
    ties = _ties(rng) if rng.random() < 0.6 else None
    tokens = [rng.choice((None, None, 0, 1, 3)) for _ in range(2)]
    shared = rng.choice(sorted(parts)) if rng.random() < 0.06 else ""
    ignored = rng.choice(sorted(parts)).split(".")[0] if rng.random() < 0.06 else ""
    init = rng.choice(("v4", "init", "init", "nothing", "mixed"))
    changing = bool(tables) and rng.random() < 0.15
    return Shape(tuple(parts.values()), tables, ties, init, shared, changing, tokens[0], tokens[1], ignored)


def _table(rng: random.Random, path: str) -> Table:
    form = rng.choice(("inv", "inv", "sines", "ids", "mask", "zeros"))
    persistent = rng.random() < 0.3
    derived = tuple(rng.sample(sorted(DERIVED), _some(rng, 2, 3, 1))) if form in ("inv", "sines") else ()
    moment = way = again = ""
    if not persistent and rng.random() < 0.75:
        moment = rng.choice(("_init_weights", "_init_weights", "tie_weights", *MOMENTS[4:7]))
        way = rng.choice(("", *sorted(FILLS), *sorted(FILLS)))
        again = rng.choice(("", *sorted(AGAIN), *sorted(AGAIN))) if derived else ""
    if form == "sines":  # what is not on meta cannot be computed with what is
        derived, again = (), ""
    return Table(path, form, persistent, derived, rng.random() < 0.4, moment, way, again)


def _ties(rng: random.Random) -> Ties:
    form = rng.choice(("dict", "dict", *sorted(DECLARATIONS)))
    override = rng.choice(OVERRIDES) if rng.random() < 0.4 else ""
    flag = rng.choice((True, True, True, False, False, None))
    if override in ("transposed", "a slice"):  # of another shape than the embedding: nothing of it can be declared
        form = "none"
    heads = 2 if form in ("dict", "alternation") and rng.random() < 0.3 else 1
    return Ties(rng.choice(("", "", "inner.")), form, override, flag, rng.random() < 0.7, heads)


def tied_keys(shape: Shape) -> list[str]:
    """The embedding's key, and those of its heads."""
    if shape.ties is None:
        return []
    names = ["emb.weight", "head.weight", "skull.weight"][: 1 + shape.ties.heads]
    return [shape.ties.prefix + name for name in names]


def _stored(rng: random.Random, shape: Shape, keys: dict[str, torch.Tensor]) -> Stored:
    ends = tied_keys(shape)
    missing: set[str] = set()
    if ends:  # mostly one end alone, as published
        case = rng.choice(("head", "head", "head", "head", "embedding", "both", "both", "neither"))
        missing |= {"head": set(ends[1:]), "embedding": {ends[0]}, "neither": set(ends)}.get(case, set())
    others = sorted(keys.keys() - set(ends))
    if rng.random() < 0.3:
        missing |= set(rng.sample(others, min(len(others), 1 + _some(rng, 3, 1))))
    left = sorted(keys.keys() - missing)
    renamed: dict[str, str] = {}
    if left and rng.random() < 0.15:
        renamed = _renamed(rng, left)
    odd: dict[str, str] = {}
    if rng.random() < 0.15:
        floats = [key for key in left if keys[key].is_floating_point() and keys[key].dim() > 1]
        whole = [key for key in left if keys[key].dtype == torch.int64]
        if whole and rng.random() < 0.7:
            odd[rng.choice(whole)] = rng.choice(("fraction", "whole"))
        elif floats:
            odd[rng.choice(floats)] = rng.choice(("int8", "int8 scale", "complex", "huge"))
    shards = rng.choice((2, 3)) if rng.random() < 0.15 else 1
    twice = (rng.choice(left), rng.random() < 0.6) if shards > 1 and left and rng.random() < 0.5 else None
    in_bin = rng.random() < 0.15 or "complex" in odd.values()
    dtype = rng.choice(("float32", "float32", "float32", "float16", "bfloat16"))
    overlap = in_bin and not odd and rng.random() < 0.5
    return Stored(frozenset(missing), renamed, dtype, odd, rng.random() < 0.5, shards, twice, in_bin, overlap)


def _renamed(rng: random.Random, keys: list[str]) -> dict[str, str]:
    how = rng.choice(("prefix", "prefix", "inside", "module"))
    if how == "prefix":
        return {key: "wrapped." + key for key in keys}
    if how == "inside":
        return {key: "layers." + key[6:] for key in keys if key.startswith("block.")}
    module = rng.choice(keys).rpartition(".")[0]
    return {key: key.replace(module, module + "_renamed", 1) for key in keys if key.rpartition(".")[0] == module}


def _writes(rng: random.Random, shape: Shape, keys: dict[str, torch.Tensor], stored: Stored) -> tuple[Write, ...]:
    drawn: dict[str, Write] = {}
    second = f"{shape.shared}." if shape.shared else "\0"
    able = [
        key
        for key, value in sorted(keys.items())
        if value.is_floating_point() and not key.startswith(("second.", second)) and key not in stored.odd
    ]
    for _ in range(_some(rng, 4, 5, 1) if able else 0):
        key = rng.choice(able)
        size = keys[key].shape
        ways = [
            name
            for name, how in sorted(WAYS.items())
            if len(size) >= how.min_dims
            and not (how.oblong and size == size[::-1])
            and not (how.turns and key in tied_keys(shape))
            # An initialiser may then fail on it, in one mode and not in another: that is no fault of anybody's.
            and not (name == "cast to int8" and stored.renamed)
        ]
        rows = [row for row in (shape.pad, shape.eos, 0, 1) if row is not None and row < size[0]]
        drawn[key] = Write(rng.choice(MOMENTS), key, rng.choice(ways), rng.choice(rows))
    return tuple(drawn.values())


def _way(rng: random.Random, shape: Shape, stored: Stored) -> Way:
    dtype = rng.choice(("float32", "float32", "float32", "float16", "bfloat16", ""))
    if "huge" in stored.odd.values():
        dtype = "float16"
    where: Any = rng.choice((None,) * 12 + ("cpu", "cpu", "disk", "disk", "meta"))
    if stored.bin and where == "disk":
        where = None
    given = where is None and stored.shards == 1 and rng.random() < 0.1
    scale = 3.0 if shape.tables and rng.random() < 0.2 else None
    return Way(dtype, where, given, rng.random() < 0.05, scale)
