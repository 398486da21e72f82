"""Every test starts and ends with tiedquiet on and nothing said yet."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import tiedquiet
from tests.checkpoints import Printed, printing


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--table", help="append the truth table of tests/compat to this file, as JSON lines")


@pytest.fixture(autouse=True)
def _enabled() -> Iterator[None]:
    with tiedquiet.enable("on"):
        yield


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A distributed run of which this process is the only one."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def printed() -> Iterator[Printed]:
    with printing() as handler:
        yield handler
