"""One load without transformers around it: what no model of the other tests runs into."""

from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.checkpoints import loading
from tiedquiet import Finding, Verdict
from tiedquiet.proof.operations import operation_of
from tiedquiet.proof.repair import repair
from tiedquiet.proof.since import proof
from tiedquiet.proof.stored import is_padding


class Pair(torch.nn.Module):
    """Two names that are declared to be one tensor."""

    _tied_weights_keys = {"b.weight": "a.weight"}  # noqa: RUF012

    def __init__(self, a: torch.Tensor, b: torch.Tensor) -> None:
        super().__init__()
        self.config = SimpleNamespace(tie_word_embeddings=True, pad_token_id=None)
        for name, weight in (("a", a), ("b", b)):
            part = torch.nn.Module()
            part.weight = torch.nn.Parameter(weight, requires_grad=False)
            self.add_module(name, part)


def judged(model: torch.nn.Module, missing: set[str], **how: Any) -> dict[str, Verdict]:
    load = loading(model, missing, **how)
    with load.watch:
        findings = load.findings(model)
    return {finding.key: finding.verdict for finding in findings}


def test_two_names_of_one_tensor_that_the_file_does_not_know_are_unproven() -> None:
    model = Pair(torch.ones(2), torch.ones(2))
    model.b = model.a
    assert judged(model, set()) == {"a.weight": Verdict.UNPROVEN, "b.weight": Verdict.UNPROVEN}
    values = {"a.weight": torch.ones(2), "b.weight": torch.zeros(2)}
    assert judged(model, set(), read=values.get) == {"b.weight": Verdict.AMBIGUOUS}
    assert judged(model, set(), read={**values, "b.weight": torch.ones(2)}.get) == {}


def test_of_models_inside_another_names_are_those_in_the_whole() -> None:
    whole: Any = torch.nn.Module()
    for name in ("one", "two"):
        part = Pair(torch.ones(2), torch.zeros(2))
        part.c = torch.nn.Linear(1, 1, bias=False)
        whole.add_module(name, part)
        load = loading(part, {"b.weight", "c.weight"})
        load.watch.placeholders.add(part.c.weight)
        with load.watch:
            load.findings(part)
        load.close(part)
    found = proof(whole)
    assert [(f.key, f.verdict, f.source) for f in found.findings] == [
        ("one.b.weight", Verdict.UNTIED, "one.a.weight"),
        ("one.c.weight", Verdict.UNWRITTEN, None),
        ("two.b.weight", Verdict.UNTIED, "two.a.weight"),
        ("two.c.weight", Verdict.UNWRITTEN, None),
    ]
    assert (found.stored, found.total) == (2, 6)


def test_what_misses_nothing_is_not_asked_for_its_head() -> None:
    """Which may have been taken off since: some models then look for it in an empty list."""
    model: Any = Pair(torch.ones(2), torch.ones(2))
    load = loading(model, set())
    with load.watch:
        load.findings(model)
    load.close(model)
    model.get_output_embeddings = lambda: [][0]
    assert proof(model).ok


def test_what_cannot_be_compared_is_unproven() -> None:
    model = Pair(torch.ones(2), torch.ones(2).to_sparse())
    assert judged(model, {"b.weight"}) == {"b.weight": Verdict.UNPROVEN}


def test_a_tie_without_a_stored_end_does_not_hide_that_nothing_was_written() -> None:
    model = Pair(torch.ones(2), torch.ones(2))
    load = loading(model, {"a.weight", "b.weight"})
    with load.watch:
        model.a.weight = torch.nn.Parameter(torch.empty(2), requires_grad=False)
        findings = load.findings(model)
    assert {f.key: f.verdict for f in findings} == {"a.weight": Verdict.UNWRITTEN, "b.weight": Verdict.MISSING}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda data: data.t(), {}),
        (lambda data: data.view(torch.int32), {"a.weight": Verdict.OVERWRITTEN}),
        (lambda data: data[:1].expand(3, 3), {"a.weight": Verdict.OVERWRITTEN}),
    ],
    ids=["turned", "retyped", "one row expanded"],
)
def test_another_view_of_the_same_memory(change: Any, expected: dict[str, Verdict]) -> None:
    model = Pair(torch.arange(9.0).reshape(3, 3), torch.arange(9.0).reshape(3, 3))
    load = loading(model, set())
    model.a.weight.data = change(model.a.weight.data)  # on a GPU the watch takes no notice of `.data`
    with load.watch:
        findings = load.findings(model)
    assert {f.key: f.verdict for f in findings} == expected


@pytest.mark.parametrize(
    "then",
    [lambda weight: None, lambda weight: weight.mul_(1), lambda weight: setattr(weight, "data", weight.data.clone())],
    ids=["and no more", "then written here", "then given other memory"],
)
@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        (torch.ones(2), Verdict.OVERWRITTEN),
        (torch.full((2,), 2.0), None),  # the same values again
        (None, Verdict.UNPROVEN),
        (torch.ones(2, 1), Verdict.UNPROVEN),  # converted while it was read
    ],
)
def test_what_another_thread_wrote_is_held_against_the_file(
    values: torch.Tensor | None, verdict: Verdict | None, then: Any
) -> None:
    model: Any = Pair(torch.ones(2), torch.ones(2))
    model.config.tie_word_embeddings = False  # or the two ends, both stored, would differ
    load = loading(model, set(), read={"a.weight": values}.get)
    with load.watch:
        writer = Thread(target=lambda: model.a.weight.add_(1))
        writer.start()
        writer.join()
        then(model.a.weight)
        findings = load.findings(model)
    assert {f.key: f.verdict for f in findings} == ({"a.weight": verdict} if verdict else {})


@pytest.mark.parametrize("why", ["file", "group"])
def test_repair_leaves_what_would_lose_something(why: str) -> None:
    model: Any = Pair(torch.arange(3.0), torch.ones(3))
    missing, expected, places = {"b.weight"}, Verdict.UNTIED, {}
    if why == "file":  # the stored end stays on disk, and its file is gone
        model.a.weight = torch.nn.Parameter(torch.ones(3, device="meta"), requires_grad=False)
        expected, places = Verdict.UNPROVEN, {"a.weight": {}}
    else:  # two stored members differ, and none of them is what this one was declared tied to
        model.c = torch.nn.Module()
        model.c.weight = torch.nn.Parameter(torch.zeros(3), requires_grad=False)
        model._tied_weights_keys = {"a.weight": "b.weight", "c.weight": "b.weight"}
    load = loading(model, missing, protect=True, offloaded=places)
    with load.watch:
        findings, repaired = repair(load, model, load.findings(model))
    assert repaired == []
    assert {finding.key: finding.verdict for finding in findings} == {"b.weight": expected}


def test_a_file_that_went_away_while_it_was_repaired() -> None:
    model: Any = Pair(torch.ones(3, device="meta"), torch.ones(3))
    answers = [torch.arange(3.0)]
    read = lambda _: answers.pop() if answers else None  # noqa: E731
    load = loading(model, {"b.weight"}, read=read, protect=True, offloaded={"a.weight": {}})
    with load.watch:
        findings, repaired = repair(load, model, load.findings(model))
    assert repaired == []
    assert findings[0].verdict is Verdict.UNPROVEN


def test_an_operator_without_a_schema_is_let_through() -> None:
    assert operation_of(torch.ops.higher_order.cond) is None


def test_a_load_that_was_not_settled_proves_nothing() -> None:
    model = Pair(torch.ones(2), torch.ones(2))
    loading(model, set()).close(model)
    assert not proof(model).ok
    assert not proof(object()).ok


def test_what_stays_on_disk_and_has_nothing_that_reads_it_is_unproven() -> None:
    """Up to 5.3.0, where all of a model stays there."""
    model = Pair(torch.ones(2, device="meta"), torch.ones(2))
    load = loading(model, set(), offloaded={"a.weight": {}})
    assert load.findings(model) == []
    load.is_over = True
    (found,) = load.findings(model)
    assert (found.key, found.verdict) == ("a.weight", Verdict.UNPROVEN)
    assert found.why == "its values stay on disk, and nothing reads them"
    model.a._hf_hook = object()
    assert load.findings(model) == []


@pytest.mark.parametrize("how", ["", "written", "swapped"])
def test_what_accelerate_puts_aside_is_judged_where_it_was_read_to(how: str) -> None:
    values = torch.arange(2.0)
    model = Pair(values.clone(), torch.ones(2))
    load = loading(model, set(), read={"a.weight": values, "b.weight": torch.ones(2)}.get)
    with load.watch:
        if how == "written":
            model.a.weight.data.zero_()
        elif how == "swapped":
            model.a.weight.data = torch.zeros(2)
        model.a.weight = torch.nn.Parameter(model.a.weight.to("meta"), requires_grad=False)
        model.a._hf_hook = object()
    found = {finding.key: finding.verdict for finding in load.findings(model)}
    assert found == ({"a.weight": Verdict.OVERWRITTEN} if how else {"b.weight": Verdict.AMBIGUOUS})


def test_what_is_no_padding() -> None:
    model = torch.nn.ModuleDict({"table": torch.nn.Embedding(4, 2, padding_idx=1)})
    weight = model["table"].weight
    assert is_padding(model, "table.weight", weight, torch.cat([weight[:1], torch.ones(1, 2), weight[2:]]).detach())
    for before in (None, weight[:3].detach(), (weight.detach(),), weight.detach() + 1):
        assert not is_padding(model, "table.weight", weight, before)


def test_a_value_too_large_for_its_type_is_lost_in_strict_and_unproven_else() -> None:
    values = torch.tensor([1.0, 1e9])
    model = Pair(values.half(), torch.ones(2).half())
    load = loading(model, {"b.weight"}, read={"a.weight": values}.get)
    model.b.weight = model.a.weight
    load.reading.narrowed.add("a.weight")
    (found,) = load.findings(model)
    assert (found.key, found.verdict, found.source) == ("b.weight", Verdict.UNPROVEN, "a.weight")
    load.is_strict = True
    lost, follows = load.findings(model)
    assert (lost.key, lost.verdict, follows.verdict) == ("a.weight", Verdict.OVERWRITTEN, Verdict.OVERWRITTEN)
    assert lost.why == "by the cast to float16, which is too small for values that the file has as float32"
    with load.watch:
        model.a.weight.data.mul_(1)
    assert [finding.verdict for finding in load.findings(model)] == [Verdict.OVERWRITTEN] * 2


class Scaled(torch.nn.Parameter):
    """A type of its own with a plain tensor's memory, as those of bitsandbytes have."""


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda weight: None, {}),
        (lambda weight: setattr(weight, "data", torch.zeros(2)), {"a.weight": Verdict.OVERWRITTEN}),
        (lambda weight: weight.detach().add_(1), {"a.weight": Verdict.OVERWRITTEN}),
        (lambda weight: setattr(weight, "data", weight.data.clone()), {}),
    ],
    ids=["as it was", "other data", "written to", "the same values elsewhere"],
)
def test_a_type_of_its_own_is_known_by_where_it_was_read_to(change: Any, expected: dict[str, Verdict]) -> None:
    model = Pair(torch.ones(2), torch.ones(3))
    model.a.weight = Scaled(torch.arange(2.0), requires_grad=False)
    model._tied_weights_keys = {}
    load = loading(model, set())
    assert isinstance(load.reading.read_to["a.weight"], tuple)
    with load.watch:
        change(model.a.weight)
    assert {finding.key: finding.verdict for finding in load.findings(model)} == expected


def test_repair_leaves_alone_what_is_tied_to_values_that_cannot_be_had() -> None:
    model = Pair(torch.ones(2, device="meta"), torch.zeros(2))
    load = loading(model, {"b.weight"}, offloaded={"a.weight": {}})
    load.findings(model)
    repair(load, model, [Finding("b.weight", Verdict.UNTIED, "a.weight", "", True)])
    assert model.b.weight.tolist() == [0, 0]
