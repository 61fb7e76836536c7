import os

import pytest


@pytest.fixture(scope="session")
def pocket():
    """The bundled model; EARLYEXIT_TEST_MODEL names other weights of its kind to run the suite against."""
    return os.environ.get("EARLYEXIT_TEST_MODEL", "pocket")
