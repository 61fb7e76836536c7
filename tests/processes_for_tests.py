"""Servers of other packages, as processes of the tests' own."""

import contextlib
import os
import signal
import subprocess
import time

import httpx


@contextlib.contextmanager
def served(command, folder, health, seconds, **environment):
    """While the server runs that `command` starts in `folder`, and that answers at `health` within `seconds`."""
    with (folder / "log").open("w") as log:
        started = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **environment}, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + seconds
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    httpx.get(health, timeout=5).raise_for_status()
                    break
                said = (folder / "log").read_text()[-3000:]
                assert started.poll() is None, said
                assert time.monotonic() < deadline, said
                time.sleep(1)
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGTERM)
            started.wait(60)
