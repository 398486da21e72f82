"""The messages: what many keys of one line come to."""

import logging
from collections.abc import Iterator

import pytest
import transformers.utils.loading_report  # noqa: F401 (what folds the numbers)

import tiedquiet
from tiedquiet.doors.outcome import fold
from tiedquiet.verdict import Finding, LoadError, Proof, Verdict
from tiedquiet.words import explanations, say

PARTS = ["k.bias", "k.weight", "norm.weight", "q.bias", "q.weight", "v.bias", "v.weight"]


def unread(*pairs: tuple[str, str]) -> str:
    findings = [
        Finding(key, Verdict.UNREAD, source, "because nothing renamed them", True, "Cure") for key, source in pairs
    ]
    (line,) = explanations(findings, fold, len(findings))
    return line


def renamed(ours: str, theirs: str, parts: list[str] = PARTS) -> Iterator[tuple[str, str]]:
    return ((ours + part, theirs + part) for part in parts)


def test_of_many_keys_under_another_prefix_one_is_named_and_the_rest_counted() -> None:
    line = unread(
        ("head.weight", "language.head.weight"),
        *renamed("model.language.", "language.model."),
        *renamed("model.vision.", "vision.", PARTS[:3]),
    )
    assert line == (
        "unread, 11 of 11 tensors were NOT read, although the checkpoint has them: "
        "model.language.k.bias is language.model.k.bias and 6 more of model.language.* likewise, "
        "model.vision.k.bias is vision.k.bias and 2 more of model.* likewise, "
        "head.weight is language.head.weight there, because nothing renamed them. Cure"
    )


def test_a_prefix_that_the_model_lacks_is_told_by_the_file_s() -> None:
    line = unread(*renamed("", "module."), *renamed("layer.", "module.layer."))
    assert "k.bias is module.k.bias and 13 more of module.* likewise there" in line


def test_the_same_names_in_another_form_have_no_prefix_to_name() -> None:
    line = unread(*((f"{name}.weight", f"{name}.weight") for name in "abcdefghi"))
    assert "a.weight is a.weight and 8 more likewise there" in line


@pytest.mark.parametrize("count", [8, 9])
def test_a_few_keys_are_all_named(count: int) -> None:
    pairs = list(renamed("model.", "", [*PARTS, "o.bias", "o.weight"]))[:count]
    line = unread(*pairs)
    assert [f"{key} is {name}" in line for key, name in pairs] == [True] + [count == 8] * (count - 1)


def test_of_many_keys_that_have_nothing_in_common_the_first_are_named() -> None:
    line = unread(*((f"layer.{name}", f"block.{name}_proj") for name in "abcdefghij"))
    assert "layer.h is block.h_proj and 2 more there" in line
    assert "layer.i" not in line


def test_numbered_keys_are_folded_before_they_are_counted() -> None:
    line = unread(*((f"layers.{n}.experts.{k}", f"layers.{n}.moe.{k}_proj") for n in range(9) for k in ("down", "up")))
    assert (
        "layers.{0, 1, 2, 3, 4, 5, 6, 7, 8}.experts.down is layers.{0, 1, 2, 3, 4, 5, 6, 7, 8}.moe.down_proj," in line
    )
    assert "more" not in line


def test_a_name_of_the_file_is_no_line_of_a_log_and_no_command(caplog: pytest.LogCaptureFixture) -> None:
    name = "a\n::add-mask::x ##[add-mask]x\x1b[2J"
    said = r"a\n::add-mask::x \x23#[add-mask]x\x1b[2J"
    say(logging.WARNING, name)
    assert caplog.messages == [said]
    assert str(LoadError(name)) == said
    proof = Proof("Model", 0, (Finding(name, Verdict.UNREAD),), 1)
    assert str(proof).splitlines()[1:] == [f"  unread {said}"]


@pytest.mark.parametrize(
    ("cure", "left"),
    [
        ("Set TIEDQUIET=repair to read them, or pass a key_mapping", "Pass a key_mapping"),
        ("Set TIEDQUIET=repair to read them", "TIEDQUIET=repair did not read them"),
        (
            "If it should be one tensor, set TIEDQUIET=repair or declare it there",
            "If it should be one tensor, declare it there",
        ),
        (
            "If it should be one tensor, set TIEDQUIET=repair",
            "If it should be one tensor, TIEDQUIET=repair did not mend it",
        ),
    ],
)
def test_to_set_repair_is_no_advice_in_repair(cure: str, left: str) -> None:
    found = [Finding("a", Verdict.UNREAD, "b", "because", True, cure)]
    for mode, said in ("on", cure), ("repair", left):
        with tiedquiet.enable(mode):
            (line,) = explanations(found, list, 1)
        assert line.endswith(f"because. {said}")
    with tiedquiet.enable("repair"):
        (line,) = explanations([Finding("a", Verdict.OVERWRITTEN, "a", "by it", True)], list, 1)
    assert line.endswith(
        "a by it. Make that code skip loaded tensors, as the functions of transformers.initialization do"
    )


def test_a_name_keeps_its_own_words_in_repair() -> None:
    """What takes the advice back looks at the advice alone."""
    name = "Set TIEDQUIET=repair to a.weight"
    found = [Finding(name, Verdict.UNREAD, name, "because", True, "Set TIEDQUIET=repair to read them")]
    with tiedquiet.enable("repair"):
        (line,) = explanations(found, list, 1)
    assert line.count(name) == 2
    assert line.endswith("TIEDQUIET=repair did not read them")
