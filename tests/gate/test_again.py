"""A load that is begun a second time, and stopped before it reads a value."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel

from tests.checkpoints import gpt2
from tiedquiet.gate.again import begin


def test_a_load_of_another_thread_is_not_stopped(tmp_path: Path) -> None:
    GPT2LMHeadModel(gpt2()).save_pretrained(tmp_path)
    theirs: list[Any] = []

    def load() -> None:
        with ThreadPoolExecutor(1) as pool:
            theirs.append(pool.submit(GPT2LMHeadModel.from_pretrained, tmp_path).result())
        theirs.append(GPT2LMHeadModel.from_pretrained(tmp_path))

    again = begin(load)
    assert again is not None
    assert all(parameter.is_meta for parameter in again.model.parameters())
    (model,) = theirs  # the other one was stopped
    stored = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in stored.items())


def test_what_reads_nothing_is_begun_by_nothing() -> None:
    assert begin(lambda: None) is None
