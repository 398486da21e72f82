"""Random tie graphs, stored sets and corruptions: the verdict agrees with the bytes that were stored."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checkpoints import loading, same_memory
from tiedquiet import Verdict
from tiedquiet.proof.repair import repair

KEYS = [f"{name}.weight" for name in "abcdef"]


@dataclass
class World:
    """A model, what is declared of it, what its file stores, and what is done to it after it was read."""

    declared: dict[str, str]
    stored: set[str]
    equal: bool
    tied: dict[str, str]
    corrupted: set[str]
    padding: set[str]


@st.composite
def worlds(draw: Any) -> World:
    subset = st.sets(st.sampled_from(KEYS))
    pairs = draw(st.lists(st.tuples(st.sampled_from(KEYS), st.sampled_from(KEYS)), max_size=5))
    tied = draw(st.lists(st.tuples(st.sampled_from(KEYS), st.sampled_from(KEYS)), max_size=5))
    return World(
        {t: s for t, s in pairs if t != s}, draw(subset), draw(st.booleans()), dict(tied), draw(subset), draw(subset)
    )


def build(world: World) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    model = torch.nn.Module()
    generator = torch.Generator().manual_seed(1)
    common = torch.randn(9, 8, generator=generator)
    for key in KEYS:
        part = torch.nn.Module()
        values = common if world.equal else torch.randn(9, 8, generator=generator)
        part.weight = torch.nn.Parameter(values.clone())
        model.add_module(key[0], part)
    model._tied_weights_keys = world.declared  # type: ignore[assignment]
    model.config = SimpleNamespace(tie_word_embeddings=True, pad_token_id=0)  # type: ignore[assignment]
    return model, {key: model.get_parameter(key).detach().clone() for key in world.stored}


def spoil(model: torch.nn.Module, world: World) -> None:
    for target, source in world.tied.items():
        model.get_submodule(target[0]).weight = model.get_parameter(source)
    with torch.no_grad():
        for key in KEYS:
            if key in world.padding:
                model.get_parameter(key)[0] = 0
            if key in world.corrupted:
                model.get_parameter(key).normal_()


@settings(max_examples=400, deadline=None)
@given(worlds(), st.booleans())
def test_the_verdict_agrees_with_the_bytes(world: World, repairing: bool) -> None:
    model, stored = build(world)
    load = loading(model, set(KEYS) - world.stored, protect=repairing)
    with load.watch:
        spoil(model, world)
        findings = load.findings(model)
        if repairing:
            findings, _ = repair(load, model, findings)
    now = {key: model.get_parameter(key) for key in KEYS}
    judged = {finding.key: finding.verdict for finding in findings}
    group = groups_of(world.declared)
    for found in findings:
        followed = [s for s in stored if same_memory(now[found.key], now[s])]
        intact = [s for s in followed if torch.equal(now[s], stored[s])]
        members = group.get(found.key, {found.key})
        match found.verdict:
            case Verdict.TIED:
                assert found.key not in stored
                assert found.source in intact
            case Verdict.COPIED:
                assert not set(followed) & members
                assert torch.equal(now[found.key], now[str(found.source)])
            case Verdict.OVERWRITTEN:
                assert found.source in followed
                assert not torch.equal(now[str(found.source)], stored[str(found.source)])
            case Verdict.UNTIED:
                assert not set(followed) & members
                assert members & stored.keys()
            case Verdict.MISSING:
                assert not members & stored.keys()
            case Verdict.AMBIGUOUS if found.key in stored:  # both ends of a tie that is asked for
                assert found.source in stored
                assert found.source in members
                assert not torch.equal(now[found.key], now[str(found.source)])
            case Verdict.AMBIGUOUS:
                is_copy = not followed and torch.equal(now[found.key], stored[str(found.source)])
                assert found.source in intact or is_copy
                assert world.declared.get(found.key) != found.source
                rivals = [s for s in members & stored.keys() if not torch.equal(now[s], now[str(found.source)])]
                assert rivals
            case other:
                raise AssertionError(other)
    for key in KEYS:
        alone = len(group.get(key, {key})) == 1
        followed = [s for s in stored if same_memory(now[key], now[s])]
        if key not in stored and (not alone or followed):
            assert key in judged, "every member that was not stored gets a verdict"
        if key in stored and not torch.equal(now[key], stored[key]):
            assert judged[key] is Verdict.OVERWRITTEN, "and every stored one that was lost"
    if repairing:
        assert all(torch.equal(now[key], value) for key, value in stored.items())


def groups_of(declared: dict[str, str]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for target, source in declared.items():
        union = found.get(target, {target}) | found.get(source, {source})
        found.update(dict.fromkeys(union, union))
    return found
