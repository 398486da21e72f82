"""What the tests of the gate share."""

from functools import cache
from pathlib import Path

import pytest
from transformers import GPT2LMHeadModel

from tests.checkpoints import gpt2, save
from tests.gate.quantised import MAKERS, Make


@pytest.fixture
def good(tmp_path: Path) -> Path:
    save(GPT2LMHeadModel(gpt2()), tmp_path / "good")
    return tmp_path / "good"


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Makes a quantised checkpoint of a kind; each once."""

    @cache
    def made(kind: str) -> Path:
        folder = tmp_path_factory.mktemp("quantised")
        MAKERS[kind](folder)
        return folder

    return made
