"""Runs of the Trainer that the tests of its doors share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiedquiet
from tests.doors.training import EVALUATED, trainer_of


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Callable[[], Any]], Path]:
    """For each model a folder with `base`, and a real checkpoint of two steps of training from it."""
    made: dict[Callable[[], Any], Path] = {}

    def run(build: Callable[[], Any]) -> Path:
        if build not in made:
            folder = made[build] = tmp_path_factory.mktemp(build.__name__)
            torch.manual_seed(0)
            build().save_pretrained(folder / "base")
            model = type(build()).from_pretrained(folder / "base")
            with tiedquiet.enable("on"):
                trainer_of(model, folder, **EVALUATED).train()
        return made[build]

    return run
