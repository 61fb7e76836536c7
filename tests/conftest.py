import os

import pytest
from hypothesis import settings

# Small machines are noisy: how long an example takes says nothing. In CI the examples are the same every time.
settings.register_profile("here", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "here")


@pytest.fixture(scope="session")
def pocket():
    """The bundled model; EARLYEXIT_TEST_MODEL names other weights of its kind to run the suite against."""
    return os.environ.get("EARLYEXIT_TEST_MODEL", "pocket")
