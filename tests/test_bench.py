"""The bench runs, and its table says what was measured and what was not."""

import pytest
import torch

from langchain_earlyexit.cli import main
from langchain_earlyexit.lab import bench
from langchain_earlyexit.lab.bench import BLOCKS, Size
from langchain_earlyexit.lab.measured import Line, interleaved, ratio, table

TINY = Size(quick=True, progress=False)


def test_the_ratio_is_the_median_of_the_ratios_of_rounds():
    assert ratio([1.0, 1.0, 10.0], [2.0, 3.0, 20.0]) == 2.0


def test_who_goes_first_rotates():
    order = []
    seconds = interleaved({name: lambda name=name: order.append(name) for name in "abc"}, 3, "", progress=False)
    assert "".join(order) == "abc" + "bca" + "cab"
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_the_table_tells_figures_and_the_lack_of_them():
    said = table([Line(1, "x", 1234.5, "y", 0.5, 2.469, "≥ 2"), Line(2, "z", note="skipped")])
    assert "| 1,234" in said
    assert "| 2.47 " in said
    assert said.splitlines()[-1].endswith("| skipped |")
    assert len({len(line) for line in said.splitlines()}) == 1


def test_a_note_of_several_lines_and_bars_stays_one_cell():
    assert table([Line(1, "x", note="one\n two|three")]).splitlines()[-1].endswith("| one two\\|three |")


def test_a_peer_that_does_not_run_is_in_the_table_with_its_reason(monkeypatch):
    def broken(*given, **more):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(bench, "smollm2", lambda: None)
    monkeypatch.setattr(bench.Plain, "generate_batch", broken)
    monkeypatch.setattr(bench.Plain, "chat", broken)
    told = {line.beside: line for line in BLOCKS[2](TINY) if "pocket" in line.what}
    for peer in ("generate_batch()", "ChatHuggingFace in turn"):
        assert told[peer].theirs is None
        assert told[peer].note == "does not run: RuntimeError: no such kernel"
    assert told["generate() in turn"].theirs > 0


def test_the_table_is_written_with_the_machine_it_was_measured_on(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("langchain_earlyexit.lab.bench.BLOCKS", {1: lambda size: [Line(1, "speed", 2.0)]})
    main(["bench", "--block", "1", "--out", str(tmp_path / "new" / "bench.md")])
    written = (tmp_path / "new" / "bench.md").read_text()
    assert f"{torch.get_num_threads()} threads; torch {torch.__version__.split('+')[0]}" in written
    assert "| speed | 2 " in written
    assert capsys.readouterr().out.strip() in written


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_runs(block, monkeypatch):
    monkeypatch.setattr(bench, "smollm2", lambda: None)
    lines = BLOCKS[block](TINY)
    assert {line.block for line in lines} == {block}
    assert any(line.ours is not None for line in lines)
    for line in lines:
        assert line.ratio is None or line.ratio > 0
