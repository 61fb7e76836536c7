"""The `earlyexit` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from langchain_earlyexit._version import __version__


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="earlyexit",
        description="Early exit for local reasoning models.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str, words: str, within: argparse._SubParsersAction[argparse.ArgumentParser]
    ) -> argparse.ArgumentParser:
        return within.add_parser(
            name, help=words, description=words, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )

    demo = command("demo", "Ask the bundled model, with full thinking, DEER and CoDE-Stop side by side.", commands)
    demo.add_argument("--questions", type=_positive, default=10, help="how many held-out questions")

    ask = command("ask", "Ask one question; stream thinking and answer, then print the exit record.", commands)
    ask.add_argument("question")
    ask.add_argument("--model", default="pocket", help="pocket, a hub id, a directory, or one with a .gguf file")
    ask.add_argument(
        "--policy", default="deer", help="never, deer, codestop, convergence, eat or thinkbrake, with default settings"
    )
    ask.add_argument("--budget", type=int, default=None, help="cap on thinking tokens; 0 for none at all")
    ask.add_argument("--seed", type=int, default=None, help="equal seeds give equal text")

    bench = command("bench", "Speed of the control loop against transformers' generate().", commands)
    bench.add_argument("--model", default="pocket", help="pocket, a hub id or a directory")
    bench.add_argument("--rounds", type=_positive, default=9, help="interleaved rounds")

    pocket = commands.add_parser("pocket", help="The bundled model: train it again, or measure it.")
    parts = pocket.add_subparsers(dest="part", required=True, metavar="PART")
    train = command("train", "Train the bundled model from nothing. Resumes where it was stopped.", parts)
    train.add_argument("--out", type=Path, default=Path("runs/pocket"), help="checkpoints, log and final weights")
    measure = command("eval", "Measure the bundled model on held-out questions and print its card.", parts)
    measure.add_argument("--questions", type=_positive, default=2000, help="of the test split, and of the dev split")
    measure.add_argument("--write", action="store_true", help="also write the card beside the weights")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    given = _parser().parse_args(arguments)
    try:
        _run(given)
    except (ValueError, FileNotFoundError) as error:
        print(f"earlyexit: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _run(given: argparse.Namespace) -> None:
    # Each command loads only what it needs: `--help` must not wait for torch.
    if given.command == "demo":
        from langchain_earlyexit.pocket.demo import main as demo

        demo(given.questions)
    elif given.command == "ask":
        _ask(given)
    elif given.command == "bench":
        from langchain_earlyexit.lab.bench import against_generate

        speed = against_generate(given.model, rounds=given.rounds)
        print(f"{given.model}, greedy, one request at a time, {given.rounds} interleaved rounds, tokens per second:")
        for name, values in (("ChatEarlyExit, never", speed.ours), ("generate()", speed.theirs)):
            ordered = sorted(values)
            print(
                f"  {name:22} min {ordered[0]:6.0f}  median {ordered[len(ordered) // 2]:6.0f}  max {ordered[-1]:6.0f}"
            )
        print(f"  median ratio           {speed.ratio:.2f}")
    elif given.part == "train":
        from langchain_earlyexit.pocket.train import main as train

        train(["--out", str(given.out)])
    else:
        from langchain_earlyexit.pocket.card import markdown, measure, write

        card = measure(given.questions)
        print(markdown(card))
        if given.write:
            write(card)


def _ask(given: argparse.Namespace) -> None:
    from langchain_earlyexit.chat_models import ChatEarlyExit
    from langchain_earlyexit.record import KEY

    with ChatEarlyExit(
        model=given.model, exit_policy=given.policy, thinking_budget=given.budget, seed=given.seed
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


if __name__ == "__main__":
    sys.exit(main())
