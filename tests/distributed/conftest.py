"""One set of processes for all files of this folder."""

from __future__ import annotations

import pytest

from tests.distributed.ranks import SIZES, Ranks


@pytest.fixture(scope="session")
def ranks():
    """Seven processes, with groups of 1, 2, 3, 4 and 7 of them."""
    made = Ranks(7, SIZES)
    yield made
    made.stop()
