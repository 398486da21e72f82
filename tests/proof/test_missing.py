"""The verdict on missing keys, rule by rule: on tensors alone, with what would be known of their load."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tiedquiet import Finding, Verdict
from tiedquiet.proof.missing import judge_missing, judge_two_ends, perhaps_unread, rival_of
from tiedquiet.proof.record import Record
from tiedquiet.proof.survey import Survey
from tiedquiet.proof.ties import Group

A, B, C = torch.arange(1.0, 4.0), torch.arange(2.0, 5.0), torch.arange(3.0, 6.0)
MODEL: Any = torch.nn.Module()


def judged(state: dict[str, Any], stored: set[str], tie: Group | None = None, **known: Any) -> dict[str, Finding]:
    record = Record(stored, state.keys() - stored, len(state), **known)
    tied = dict.fromkeys(tie.members, tie) if tie else {}
    return {f.key: f for f in judge_missing(MODEL, record, Survey(state, {}, [], True, {}), tied, None)}


def tie(**sources: str) -> Group:
    return Group(sorted({*sources, *sources.values()}), sources)


def on_meta() -> torch.Tensor:
    return torch.empty(3, device="meta")


def test_what_needs_no_file_is_missing_only_where_nothing_has_its_values() -> None:
    assert judged({"a": A}, set(), free={"a"}) == {}
    assert judged({"a": on_meta()}, set(), free={"a"}, places={"a": {"weight_name": "a"}}) == {}
    assert judged({"a": on_meta()}, set(), free={"a"})["a"].verdict is Verdict.MISSING


def test_why_a_key_of_a_tie_is_missing() -> None:
    state = {"a": A, "b": B, "c": C}
    assert judged(state, set())["a"].why == ""
    assert judged(state, set(), tie(a="b"))["a"].why == "neither end of its tie is in the checkpoint"
    unread = {"b": Finding("b", Verdict.UNREAD)}
    assert judged(state, set(), tie(a="b"), lasting=unread)["a"].why == "it is tied to b, which was not read"


def test_what_follows_a_tensor_that_is_not_as_it_was_read() -> None:
    state = {"a": A, "b": A}
    for verdict, expected in ((Verdict.OVERWRITTEN, Verdict.OVERWRITTEN), (Verdict.UNPROVEN, Verdict.UNPROVEN)):
        found = judged(state, {"b"}, tie(a="b"), lasting={"b": Finding("b", verdict, None, "because")})["a"]
        assert (found.verdict, found.source, found.why) == (expected, "b", "because")
    found = judged(state, {"b"}, tie(a="b"), grown={"b"})["a"]
    assert (found.verdict, found.why) == (Verdict.UNPROVEN, "b was made larger")
    large = torch.tensor([1.0, float("inf")], dtype=torch.float16)
    found = judged({"a": large, "b": large}, {"b"}, tie(a="b"), narrowed={"b"})["a"]
    assert (found.verdict, found.why) == (Verdict.UNPROVEN, "b has values at the limit of its type")
    assert judged({"a": large, "b": large}, {"b"}, tie(a="b"))["a"].verdict is Verdict.TIED


@pytest.mark.parametrize(
    ("stored", "group", "verdict", "source"),
    [
        ({"b", "z"}, tie(a="z", b="z"), Verdict.TIED, "z"),  # its own, whatever else has that memory
        ({"m", "z"}, tie(a="z", m="z"), Verdict.TIED, "z"),  # ... and whatever the rest of the group holds
        ({"b", "m"}, tie(a="m", b="m"), Verdict.AMBIGUOUS, "b"),
        ({"b", "z"}, tie(a="m", z="m"), Verdict.TIED, "z"),  # of the tie
        ({"b", "z"}, None, Verdict.TIED, "b"),
        ({"z"}, tie(a="m", m="z"), Verdict.TIED, "z"),  # by way of one that is missing, too
    ],
)
def test_whom_a_key_follows(stored: set[str], group: Group | None, verdict: Verdict, source: str) -> None:
    found = judged({"a": A, "b": A, "m": B, "z": A}, stored, group)["a"]
    assert (found.verdict, found.source) == (verdict, source)


def test_a_tie_that_is_asked_for_explains_more_than_a_tensor_that_may_be_it() -> None:
    state, likely = {"a": A, "m": B, "z": A}, {"a": "x", "m": None}
    assert judged(state, {"z"}, tie(a="m", m="z"), likely=likely)["a"].verdict is Verdict.TIED
    assert judged(state, {"z"}, likely=likely)["a"].why == "it may be x, which is in the checkpoint and was not read"


@pytest.mark.parametrize(
    ("state", "group", "known", "expected"),
    [
        ({"a": A.clone(), "b": A}, tie(a="b"), {}, (Verdict.COPIED, "b")),
        ({"a": A.clone(), "m": C, "z": A}, tie(a="m", m="z"), {}, (Verdict.COPIED, "z")),
        # The one that it was declared to follow, whatever the rest of the group holds; else all of that has to agree.
        ({"a": A.clone(), "b": B, "z": A}, tie(a="z", b="z"), {}, (Verdict.COPIED, "z")),
        ({"a": A.clone(), "b": A, "z": A.clone()}, tie(b="a", z="a"), {}, (Verdict.COPIED, "b")),
        ({"a": A.clone(), "b": A, "z": B}, tie(b="a", z="a"), {}, (Verdict.AMBIGUOUS, "b")),
        ({"a": A.clone(), "b": B, "z": A}, tie(b="a", z="a"), {}, (Verdict.AMBIGUOUS, "z")),
        (
            {"a": A.clone(), "b": A},
            tie(a="b"),
            {"lasting": {"b": Finding("b", Verdict.UNPROVEN)}},
            (Verdict.UNTIED, "b"),
        ),
        ({"a": torch.ones(3), "b": torch.ones(3)}, tie(a="b"), {}, (Verdict.UNTIED, "b")),
        (
            {"a": on_meta(), "b": on_meta()},
            tie(a="b"),
            {"places": {"a": {"weight_name": "x"}, "b": {"weight_name": "x"}}},
            (Verdict.TIED, "b"),
        ),
        (
            {"a": on_meta(), "b": on_meta()},
            tie(a="b"),
            {"places": {"a": {"weight_name": "x"}, "b": {"weight_name": "b"}}},
            (Verdict.UNTIED, "b"),
        ),
        ({"a": on_meta(), "b": on_meta()}, tie(a="b"), {}, (Verdict.UNTIED, "b")),
    ],
)
def test_a_key_of_a_tie_with_memory_of_its_own(
    state: dict[str, torch.Tensor], group: Group, known: dict[str, Any], expected: tuple[Verdict, str]
) -> None:
    found = judged(state, state.keys() - {"a", "m"}, group, **known)["a"]
    assert (found.verdict, found.source) == expected


def test_a_tie_that_a_model_without_a_head_switches_off_is_broken() -> None:
    group = Group(["a", "b"], {"a": "b"}, {"a": "because of the config"})
    found = judged({"a": A.clone(), "b": B}, {"b"}, group)["a"]
    assert (found.verdict, found.why, found.broken) == (Verdict.UNTIED, "because of the config", True)


def test_what_cannot_be_compared_is_no_rival_of_itself() -> None:
    there = on_meta()
    assert rival_of("b", tie(a="b", c="b"), {"b": there, "c": there}) is None
    assert rival_of("b", tie(a="b", c="b"), {"b": there, "c": C}) == "c"


TURNED = torch.arange(6.0).view(2, 3)


@pytest.mark.parametrize(
    ("key", "source", "in_files", "altered", "is_found"),
    [
        (A, B, {}, set(), True),
        (A, A.clone(), {"a": B}, set(), False),
        (A, on_meta(), {"b": B}, set(), True),
        (A, on_meta(), {"b": A}, set(), False),
        (A, on_meta(), {}, set(), False),
        (on_meta(), A, {}, set(), False),
        (TURNED, TURNED.t(), {}, set(), True),
        (TURNED, TURNED.t(), {}, {"a"}, False),
        (TURNED, TURNED.t() + 1, {}, {"b"}, True),
    ],
)
def test_the_two_ends_of_a_tie_that_were_both_stored(
    key: torch.Tensor, source: torch.Tensor, in_files: dict[str, torch.Tensor], altered: set[str], is_found: bool
) -> None:
    known, group = Record({"a", "b"}, set(), 2, altered=altered), tie(a="b")
    now = Survey({"a": key, "b": source}, {}, [], True, {})
    found = list(judge_two_ends(known, now, {"a": group, "b": group}, in_files.get))
    assert [(f.key, f.verdict, f.source) for f in found] == [("a", Verdict.AMBIGUOUS, "b")] * is_found


class Mine(torch.nn.Module):
    def __init__(self, base: str, saved_by: list[str]) -> None:
        super().__init__()
        self.base_model_prefix, self.config = base, SimpleNamespace(architectures=saved_by)
        self.base = torch.nn.ModuleDict({"one": torch.nn.Linear(1, 1), "two": torch.nn.Linear(1, 1)})
        self.head = torch.nn.Linear(1, 1)


BASE = [f"base.{name}.{kind}" for name in ("one", "two") for kind in ("weight", "bias")]


@pytest.mark.parametrize(
    ("base", "saved_by", "missing", "expected"),
    [
        ("base", ["Other"], {"head.weight": "its.weight"}, set()),  # of the head of that class
        ("base", ["Other"], {"head.weight": "base.its.weight"}, {"head.weight"}),
        ("base", ["Mine"], {"head.weight": "its.weight"}, {"head.weight"}),
        ("base", [], {"head.weight": "its.weight"}, {"head.weight"}),
        ("", ["Other"], {"head.weight": "its.weight"}, {"head.weight"}),
        ("base", ["Other"], {key: f"x.{key}" for key in BASE}, set(BASE)),  # nothing of the base was read
        ("base", ["Other"], {key: f"x.{key[5:]}" for key in BASE}, set(BASE)),
        ("base", ["Other"], {key: f"x.{key[5:]}" for key in BASE[1:]}, set()),
    ],
)
def test_which_tensors_of_the_files_may_be_a_missing_key(
    base: str, saved_by: list[str], missing: dict[str, str], expected: set[str]
) -> None:
    findings = [Finding(key, Verdict.MISSING, source) for key, source in missing.items()]
    assert {finding.key for finding in perhaps_unread(Mine(base, saved_by), findings)} == expected


def test_two_keys_that_no_survey_has_are_two() -> None:
    """They are of an adapter, say: nothing shows that they are the ends of one tie."""
    found = [Finding(f"{part}.x.weight", Verdict.MISSING, "other.x.weight") for part in ("one", "two")]
    assert perhaps_unread(torch.nn.Module(), found) == []
    assert perhaps_unread(torch.nn.Module(), found[:1]) == found[:1]
