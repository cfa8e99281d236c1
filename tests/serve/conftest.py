from __future__ import annotations

import pytest

import moespac
from tests.serve.running import in_thread


@pytest.fixture(scope="session")
def engine():
    with moespac.load(host_memory="50%", profile=None) as engine:
        yield engine


@pytest.fixture(scope="module")
def server(engine):
    with in_thread(engine) as running:
        yield running
