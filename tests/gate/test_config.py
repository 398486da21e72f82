"""What a config has transformers read or do, by its own words: a stranger's is held to the rules by any name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.gate.test_check import check, config_of
from tests.gate.test_strangers import _offline, adapter, link, pipe, refused, too_long

__all__ = ["_offline", "refused"]

KERNEL = {"_attn_implementation": "somebody/kernel"}
OTHER = "config.4.0.0.json"


def of_release(folder: Path, **changes: Any) -> Path:
    """Put what transformers reads into another file, to which config.json leads."""
    path = folder / "config.json"
    own = json.loads(path.read_text())
    (folder / OTHER).write_text(json.dumps({**own, **changes}))
    path.write_text(json.dumps({**own, "configuration_files": [OTHER, "config.99.0.0.json"]}))
    return folder


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: of_release(f, **KERNEL), f"{OTHER} names somebody/kernel, compiled code that transformers fetches"),
        (lambda f: of_release(f, n_layer=10_001), f"{OTHER} asks for more than 10,000 layers (n_layer)"),
        (lambda f: of_release(f, quantization_config={"ignore": ["(a+)+b"]}), f"the quantization_config in {OTHER} has"),
        (lambda f: link(of_release(f) / OTHER), f"{OTHER} points outside the folder"),
        (lambda f: pipe(of_release(f) / OTHER), f"{OTHER} is not a regular file"),
        (lambda f: too_long(of_release(f) / OTHER), "too many for a JSON file"),
        (lambda f: (of_release(f) / OTHER).unlink(), f"config.json names {OTHER}, which is missing"),
        (lambda f: config_of(f, configuration_files=["config.x.json"]), "`configuration_files` in config.json cannot be"),
        (lambda f: config_of(f, configuration_files=5), "`configuration_files` in config.json cannot be read: 'int'"),
        (lambda f: config_of(of_release(f), **KERNEL), "config.json names somebody/kernel"),
    ],
    ids=["kernel", "layers", "pattern", "link", "pipe", "long", "missing", "no version", "no list", "of all"],
)  # fmt: skip
@pytest.mark.parametrize("is_base", [False, True])
def test_the_config_for_the_installed_release_is_looked_at(
    is_base: bool, change: Any, says: str, good: Path, tmp_path: Path, refused: Callable[[Path], str]
) -> None:
    """It is read in place of config.json, also of an adapter's base model."""
    change(good)
    assert says in refused(adapter(tmp_path / "alone", str(good)) if is_base else good)


def test_the_class_is_that_of_the_config_for_the_installed_release(
    good: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of_release(good, architectures=["GPT2Model"])
    capsys.readouterr()
    assert check(good) == 0
    assert capsys.readouterr().out.startswith("GPT2Model: 16 of 16 tensors hold the file's bytes")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"_attn_implementation_internal": "somebody/kernel"}, "config.json names somebody/kernel"),
        ({"attribute_map": {"x": "_attn_implementation"}, "x": "somebody/kernel"}, "config.json has an attribute_map"),
        ({"attribute_map": {"x": "transformers_weights"}, "x": "../x.safetensors"}, "config.json has an attribute_map"),
        ({"text_config": {"attribute_map": {"x": "n_layer"}, "x": 10**6}}, "config.json has an attribute_map"),
    ],
)  # fmt: skip
def test_what_a_config_says_under_another_name(
    change: dict[str, Any], says: str, good: Path, refused: Callable[[Path], str]
) -> None:
    config_of(good, **change)
    assert says in refused(good)
