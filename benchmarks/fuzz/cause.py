"""The likeliest cause of a fault about one name: faults with one cause are one kind, and are listed together."""

from benchmarks.fuzz.draw import tied_keys
from benchmarks.fuzz.plan import Plan, Write

WATCHED = ("_init_weights", "tie_weights")  # before the report is made; what is written there is named by its way
HARMLESS = ("the same values", "a clone", "cast to float64")


def cause(plan: Plan, name: str) -> str:
    """In a few words; what is odd about the file first, then who wrote, then how it is tied or computed."""
    if not name:
        return "of the whole load"
    shape, stored = plan.shape, plan.stored
    module = name.rpartition(".")[0]
    ends = tied_keys(shape)
    family = ends if name in ends else [name]
    if shape.shared and module in ("second", shape.shared):
        family = [name, f"second.{name.rpartition('.')[2]}", f"{shape.shared}.{name.rpartition('.')[2]}"]
    said = ["one key in two shards" for key in family if stored.twice == (key, True)]
    said += [f"stored as {stored.odd[key]}" for key in family if key in stored.odd]
    writes = [write for write in plan.writes if write.key in family and write.way not in HARMLESS]
    said += [_write(write) for write in writes if write.moment not in WATCHED]
    said += [_write(write) for write in writes if write.moment in WATCHED]
    said += _of_buffer(plan, name)
    if shape.shared and module in ("second", shape.shared):
        said.append("module shared in __init__")
    if any(key in stored.renamed for key in family):
        said.append("under another name")
    if name in ends and shape.ties is not None:
        both = len(set(ends) - stored.missing) > 1 and not stored.equal
        how = f"tie_weights: {shape.ties.override}" if shape.ties.override else f"declared by {shape.ties.form}"
        said.append(how + ", flag off" * (shape.ties.flag is False) + ", ends differ" * both)
    if plan.way.device_map in ("disk", "meta"):
        said.append(f"device_map {plan.way.device_map}")
    return next(iter(said), "nothing special")


def _write(write: Write) -> str:
    return f"{write.way} in {write.moment}" if write.moment in WATCHED else f"written in: {write.moment}"


def _of_buffer(plan: Plan, name: str) -> list[str]:
    for table in plan.shape.tables:
        if name.startswith(f"{table.path}.") and not name.endswith(".weight"):
            first = name.endswith(".base")
            if plan.way.scale is not None and not (first and table.way):
                return ["keyword of __init__"]
            if plan.shape.changing and not (first and table.way):
                return ["config changed by __init__"]
            if table.persistent:
                return ["persistent buffer"]
            if table.moment and table.moment not in WATCHED:
                return [f"filled in: {table.moment}"]
            how = table.way if first else table.again and f"computed from it again, {table.again}"
            return [f"buffer: {how or 'never filled'}"]
    return []
