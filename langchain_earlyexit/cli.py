"""The `earlyexit` command: one table of subcommands. Each loads what it needs when it runs: help waits for nothing."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from langchain_earlyexit._version import __version__
from langchain_earlyexit.lab.commands import LAB, PIPELINE, Command, positive

_Commands = argparse._SubParsersAction  # the type has no public name


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="earlyexit",
        description="Early exit for local reasoning models.",
        epilog=PIPELINE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    _add(COMMANDS, parser.add_subparsers(dest="command", required=True, metavar="COMMAND"))
    return parser


def _add(commands: Sequence[Command], within: _Commands[argparse.ArgumentParser]) -> None:
    for command in commands:
        words = command.words.replace("%", "%%")
        parser = within.add_parser(
            command.name, help=words, description=words, epilog=command.more, formatter_class=_Formatter
        )
        command.arguments(parser)
        if command.run is not None:
            parser.set_defaults(run=command.run)


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Tells defaults, and leaves the lines of what is said below the options as they are."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    given = _parser().parse_args(arguments)
    try:
        given.run(given)
    except (ValueError, OSError, ImportError) as error:  # an import error names the extra to install
        print(f"earlyexit: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


# --- demo, ask, bench ---------------------------------------------------------------------------------------------


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--questions", type=positive, default=10, help="how many held-out questions")


def _demo(given: argparse.Namespace) -> None:
    from langchain_earlyexit.pocket.demo import main as demo

    demo(given.questions)


def _ask_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("question")
    parser.add_argument("--model", default="pocket", help="pocket, a hub id, a directory, or one with a .gguf file")
    parser.add_argument(
        "--policy",
        default="deer",
        help="never, deer, codestop, lynx, probethentrial, convergence, eat, thinkbrake or giveup",
    )
    parser.add_argument(
        "--probe", default=None, help="directory or hub id of the probe that lynx and probethentrial need"
    )
    parser.add_argument("--budget", type=int, default=None, help="cap on thinking tokens; 0 for none at all")
    parser.add_argument("--seed", type=int, default=None, help="equal seeds give equal text in float32")


def _ask(given: argparse.Namespace) -> None:
    from langchain_earlyexit.chat_models import ChatEarlyExit
    from langchain_earlyexit.record import KEY

    with ChatEarlyExit(
        model=given.model, probe=given.probe, exit_policy=given.policy, thinking_budget=given.budget, seed=given.seed
    ) as llm:
        record = None
        answering = False
        for chunk in llm.stream(given.question):
            if chunk.text and not answering:
                answering = True
                print("\n\n---\n")
            print(chunk.additional_kwargs.get("reasoning_content", "") or chunk.text, end="", flush=True)
            record = chunk.response_metadata.get(KEY, record)
    print(f"\n\n{record}")


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--block", type=int, choices=range(1, 6), action="append", help="one block alone; repeatable")
    parser.add_argument("--quick", action="store_true", help="tiny loads, to see that all of it runs")
    parser.add_argument("--out", type=Path, default=None, help="also write the table to this file")


_BENCH_HEAD = """# Speed

By `{command}`: medians of interleaved runs; ratios are medians of the ratios of rounds. Ours is `ChatEarlyExit`
on the local engine; what is beside it runs the same weights, in the same process, on as many threads."""


def _bench(given: argparse.Namespace) -> None:
    from langchain_earlyexit.lab.bench import BLOCKS, Size
    from langchain_earlyexit.lab.measured import Line, table
    from langchain_earlyexit.lab.peers import machine

    lines: list[Line] = []
    try:
        for block in given.block or BLOCKS:
            lines += BLOCKS[block](Size(quick=given.quick))
    finally:  # what has been measured is told, also where a later block fails
        if lines:
            told = f"{machine()}; {date.today().isoformat()}\n\n{table(lines)}"
            print(told)
            if given.out is not None:
                given.out.parent.mkdir(parents=True, exist_ok=True)
                command = "earlyexit bench" + "".join(f" --block {block}" for block in given.block or ())
                head = _BENCH_HEAD.format(command=command + " --quick" * given.quick)
                given.out.write_text(f"{head}\n\n{told}\n", encoding="utf-8")


def _agents_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--questions", type=positive, default=500, help="held-out problems of three to six steps")
    parser.add_argument("--model", default="pocket", help="pocket, or the directory of a model that plans as it does")
    parser.add_argument("--train", type=positive, default=500, help="runs that teach the probes")
    parser.add_argument("--choose", type=positive, default=600, help="other runs, to choose settings on")
    parser.add_argument("--certify", type=positive, default=500, help="other runs, to certify a rule on")
    parser.add_argument("--epsilon", type=float, default=0.1, help="share of runs that the certified rule may change")
    parser.add_argument("--width", type=positive, default=32, help="problems in flight")
    parser.add_argument("--seed", type=int, default=0, help="draws the problems, and the chains of thought")
    parser.add_argument("--runs", type=Path, default=Path("runs/agents"), help="where what is done is kept")
    parser.add_argument("--out", type=Path, default=None, help="also write the table to this file")


def _agents(given: argparse.Namespace) -> None:
    from langchain_earlyexit.lab.agents_bench import main as bench
    from langchain_earlyexit.lab.agents_rules import Sizes

    bench(
        given.questions,
        model=given.model,
        sizes=Sizes(given.train, given.choose, given.certify, epsilon=given.epsilon),
        width=given.width,
        seed=given.seed,
        runs=given.runs,
        out=given.out,
    )


# --- the bundled model --------------------------------------------------------------------------------------------


def _pocket_arguments(parser: argparse.ArgumentParser) -> None:
    _add(_POCKET, parser.add_subparsers(dest="part", required=True, metavar="PART"))


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("runs/pocket"), help="checkpoints, log and final weights")


def _train(given: argparse.Namespace) -> None:
    from langchain_earlyexit.pocket.train import main as train

    train(["--out", str(given.out)])


def _eval_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--questions",
        type=positive,
        default=2000,
        help="of arithmetic, of the test split and of the dev split; of each other ability a quarter as many",
    )
    parser.add_argument("--write", action="store_true", help="also write the card: beside the weights, in README.md")


def _eval(given: argparse.Namespace) -> None:
    from langchain_earlyexit.pocket.card import measure
    from langchain_earlyexit.pocket.card_text import markdown, places, write

    if given.write:
        places()  # what is in the way of writing is told before minutes of measuring
    card = measure(given.questions)
    print(markdown(card))
    if given.write:
        write(card)


_POCKET = (
    Command("train", "Train the bundled model from nothing. Resumes where it was stopped.", _train_arguments, _train),
    Command("eval", "Measure the bundled model on held-out questions and print its card.", _eval_arguments, _eval),
)

COMMANDS = (
    Command(
        "demo",
        "Ask the bundled model, with full thinking, DEER and CoDE-Stop side by side.",
        _demo_arguments,
        _demo,
    ),
    Command("ask", "Ask one question; stream thinking and answer, then print the exit record.", _ask_arguments, _ask),
    Command("bench", "How fast the engine is, beside what else runs the same weights.", _bench_arguments, _bench),
    Command(
        "bench-agents",
        "What budgeting step by step saves on problems of several steps, from probes to a certificate; resumable.",
        _agents_arguments,
        _agents,
    ),
    *LAB,
    Command("pocket", "The bundled model: train it again, or measure it.", _pocket_arguments, None),
)


if __name__ == "__main__":
    sys.exit(main())
