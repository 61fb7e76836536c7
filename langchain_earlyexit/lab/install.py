"""What a headline leaves behind: probe and calibration beside the bundled weights, and its table in the README."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from langchain_earlyexit.beside import home_of
from langchain_earlyexit.lab.certify import certify, summary
from langchain_earlyexit.lab.headline import Headline
from langchain_earlyexit.lab.marks import between
from langchain_earlyexit.lab.report import brief
from langchain_earlyexit.policies import DEER, Never
from langchain_earlyexit.probe import Probe
from langchain_earlyexit.promises import FILE

README: Final = Path("README.md")
MARKS: Final = ("<!-- headline -->\n", "<!-- end of headline -->")

CALIBRATED: Final = DEER()
"""The policy whose path is certified, fixed before any figure was seen. It reads no probe, so a new probe leaves the
promise as it is."""


def refuse_unwritable(model: str) -> None:
    """Before an hour of work, not after it.

    Raises:
        ValueError: another model than the bundled one, or a README without the marks to write between.
    """
    if model != "pocket":
        raise ValueError(f"--write puts files beside the bundled weights, but the model is {model!r}; leave one out")
    if not README.is_file():
        raise ValueError(
            f"--write puts its table into ./{README} between {MARKS[0].strip()} and {MARKS[1]}, which is not there"
        )
    between(README, MARKS, "")


def install(found: Headline, out: Path) -> Iterator[str]:
    """Write it all; a line for each thing that was written.

    Args:
        found: of a run on the bundled weights.
        out: where the report is, without an ending: the README points to it.
    """
    home = home_of("pocket")
    home.mkdir(exist_ok=True)
    if found.chosen["LYNX"] == Never():
        yield "the probe is not installed: on dev no threshold of LYNX leaves early at that accuracy"
    else:
        yield f"{Probe.load(found.probe).save(home)}: the probe"
    calibration = certify(found.dev, CALIBRATED, delta=0.1, progress=False)
    calibration.save(home / FILE)
    yield f"{home / FILE}:\n{summary(calibration)}"
    told = brief(found.evaluation, out.with_suffix(".svg").as_posix(), out.with_suffix(".md").as_posix())
    README.write_text(between(README, MARKS, told), encoding="utf-8")
    yield f"{README}: the table"
