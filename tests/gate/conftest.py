"""What the tests of the gate share."""

from pathlib import Path

import pytest
from transformers import GPT2LMHeadModel

from tests.checkpoints import gpt2, save


@pytest.fixture
def good(tmp_path: Path) -> Path:
    save(GPT2LMHeadModel(gpt2()), tmp_path / "good")
    return tmp_path / "good"
