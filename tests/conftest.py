"""Every test starts and ends with tiedquiet on and nothing said yet."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import tiedquiet

if TYPE_CHECKING:  # some tests are run where there is no torch
    from tests.checkpoints import Printed


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--table", help="append the truth table of tests/compat to this file, as JSON lines")


@pytest.fixture(autouse=True)
def _enabled() -> Iterator[None]:
    tiedquiet.enable("on")
    yield
    tiedquiet.enable("on")


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A distributed run of which this process is the only one."""
    import torch

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def one_quiet_thread() -> Iterator[None]:
    """As where the fuzzers run: a process of theirs has one thread of torch, and draws no bars."""
    import torch
    import transformers

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.enable_progress_bar()
    torch.set_num_threads(threads)


@pytest.fixture
def printed() -> "Iterator[Printed]":
    from tests.checkpoints import printing

    with printing() as handler:
        yield handler
