"""Every test starts and ends with tiedquiet on and nothing said yet."""

from collections.abc import Iterator

import pytest

import tiedquiet
from tests.checkpoints import Printed, printing


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--table", help="append the truth table of tests/compat to this file, as JSON lines")


@pytest.fixture(autouse=True)
def _enabled() -> Iterator[None]:
    with tiedquiet.enable("on"):
        yield


@pytest.fixture
def printed() -> Iterator[Printed]:
    with printing() as handler:
        yield handler
