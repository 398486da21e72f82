"""The verdict on missing keys, rule by rule: on tensors alone, with what would be known of their load."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tiedquiet import Finding, Verdict
from tiedquiet.proof.missing import judge_missing
from tiedquiet.proof.record import Record
from tiedquiet.proof.survey import Survey
from tiedquiet.proof.ties import Group

A, B, C = torch.arange(1.0, 4.0), torch.arange(2.0, 5.0), torch.arange(3.0, 6.0)
MODEL: Any = SimpleNamespace()


def judged(state: dict[str, Any], stored: set[str], tie: Group | None = None, **known: Any) -> dict[str, Finding]:
    record = Record(stored, state.keys() - stored, len(state), **known)
    tied = dict.fromkeys(tie.members, tie) if tie else {}
    return {f.key: f for f in judge_missing(MODEL, record, Survey(state, {}, [], True), tied, None)}


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
        ({"a": A.clone(), "b": A, "z": B}, tie(b="a", z="a"), {}, (Verdict.UNTIED, "b")),
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
