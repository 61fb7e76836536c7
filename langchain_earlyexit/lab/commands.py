"""The lab's subcommands of `earlyexit`, from questions to a report. Each loads what it needs when it runs."""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from langchain_earlyexit.policies import Policy, policy_from_name
from langchain_earlyexit.policy_json import policy_from_dict

if TYPE_CHECKING:
    from langchain_earlyexit.chat_models import ChatEarlyExit

PIPELINE: Final = """\
From your own questions to a promise and a report:

  collect    think questions to the end; measure every signal at every check, and answer there too
  train      learn a probe from a collection (for LYNX, ProbeThenTrial and GiveUp(signal='p_safe'))
  calibrate  find the setting that changes at most a share epsilon of the answers, and certify it
  answer     run one arm live: a fixed budget, no thinking, a policy
  evaluate   try policies and thresholds by replay, without the model, beside live runs
  report     Markdown and one HTML file of an evaluation
  overhead   what the probe costs when it never leaves
  headline   all of it on the bundled model's held-out questions, in one command

Questions that train, choose, certify and report must be different ones. Each command tells more: earlyexit evaluate -h
"""


class Command(NamedTuple):
    """A subcommand: its name, one line on it, what adds its arguments, what runs it, and more to say below them.

    One that only holds others has no `run` of its own.
    """

    name: str
    words: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None] | None
    more: str | None = None


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def policy(text: str) -> Policy:
    """A policy by name, "deer", or written as it prints, "DEER(threshold=0.97)".

    Raises:
        argparse.ArgumentTypeError: neither, naming what is wrong.
    """
    try:
        return (
            policy_from_name(text) if text.isalpha() else policy_from_dict(_fields(ast.parse(text, mode="eval").body))
        )
    except (ValueError, SyntaxError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no policy: {error}") from error


def _fields(node: ast.expr) -> dict[str, Any]:
    """The JSON data of a written policy. Only names, numbers and sets are read; nothing is run."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise ValueError("write a name, or a name with fields as in DEER(threshold=0.97)")
    name = node.func.id
    if name == "FirstOf":
        return {"policy": name, "policies": [_fields(member) for member in node.args]}
    if node.args:
        raise ValueError(f"name the fields of {name}, as in threshold=0.97")
    values = {str(field.arg): _value(field.value) for field in node.keywords}
    return {"policy": name, **{key: sorted(v) if isinstance(v, set) else v for key, v in values.items()}}


def _value(node: ast.expr) -> Any:
    return float("inf") if ast.unparse(node) == "float('inf')" else ast.literal_eval(node)


# --- collect and train --------------------------------------------------------------------------------------------


def _asking_arguments(parser: argparse.ArgumentParser) -> None:
    """Of what is asked of a model, and kept in a file that grows."""
    parser.add_argument("--model", default="pocket", help="pocket, a hub id, a directory, or one with a .gguf file")
    parser.add_argument(
        "--base-url",
        nargs="+",
        default=None,
        metavar="URL",
        help="the server, or servers, of --model: see engine='vllm'",
    )
    parser.add_argument("--at-once", type=positive, default=64, help="questions in flight (default: %(default)s)")
    parser.add_argument("--data", default="pocket", help="pocket, a data set's name, or a .jsonl file of questions")
    parser.add_argument("--split", default=None, help="of the data set; its usual one when not given")
    parser.add_argument("--questions", type=positive, default=None, help="how many; all when not given")
    parser.add_argument("--temperature", type=float, default=None, help="the model's advised one when not given")
    parser.add_argument("--out", type=Path, required=True, help="a .jsonl file; an interrupted run goes on in it")


def _asked_model(given: argparse.Namespace, **settings: Any) -> ChatEarlyExit:
    """The model of `_asking_arguments`, here or on servers."""
    from langchain_earlyexit.chat_models import ChatEarlyExit

    where: dict[str, Any] = {} if given.base_url is None else {"engine": "vllm", "base_url": given.base_url}
    return ChatEarlyExit(model=given.model, probe=given.probe, max_running=given.at_once, **where, **settings)


def _depths(given: argparse.Namespace) -> list[float] | None:
    """Layers whose states are kept; none where a server answers, for it tells none."""
    return [] if given.depths is None and given.base_url is not None else given.depths


def _collect_arguments(parser: argparse.ArgumentParser) -> None:
    _asking_arguments(parser)
    parser.add_argument(
        "--kinds", nargs="+", default=None, help="checks: reflection, paragraph, sentence, interval; the model's own"
    )
    parser.add_argument(
        "--depths",
        type=float,
        nargs="*",
        default=None,
        help="layers whose states are kept, 0.5 the middle, for train alone; without numbers none",
    )
    parser.add_argument("--probe", default=None, help="directory or hub id: measures p_safe too")
    parser.add_argument("--budget", type=int, default=None, help="cap on thinking tokens")
    parser.add_argument("--system", default=None, help="a system prompt for all questions")
    parser.add_argument(
        "--graph", default=None, metavar="FILE:NAME", help="whole runs of a graph, into the folder --out: see below"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draw of questions and of the sampling")


def _collect(given: argparse.Namespace) -> None:
    from langchain_earlyexit.lab.collect import collect
    from langchain_earlyexit.lab.datasets import load

    if given.graph is not None:
        _collect_runs(given)
        return
    questions = load(given.data, given.split, given.questions, given.seed)
    asked = {"thinking_budget": given.budget, "temperature": given.temperature}
    with _asked_model(given) as llm:
        summary = collect(
            llm,
            questions,
            given.out,
            kinds=given.kinds,
            depths=_depths(given),
            at_once=given.at_once,
            system=given.system,
            seed=given.seed,
            **{name: value for name, value in asked.items() if value is not None},
        )
    print(f"{given.out}: {summary.done} questions done, {summary.before} before, {len(summary.refused)} left out")


def _collect_runs(given: argparse.Namespace) -> None:
    from langchain_earlyexit.lab.agents_rules import plan_questions, plans_of
    from langchain_earlyexit.lab.collect import DEPTHS
    from langchain_earlyexit.lab.datasets import load
    from langchain_earlyexit.lab.trajectories import collect_runs, graph_maker

    if given.system is not None:
        raise ValueError("--system is for single questions, and --graph has prompts of its own; leave one of them out")
    if given.data == "plans":
        questions = plan_questions(given.split or "dev", given.questions or 500, given.seed)
    else:
        questions = load(given.data, given.split, given.questions, given.seed)
    made = plans_of if given.graph == "plan_and_solve" else graph_maker(given.graph)
    asked = {"thinking_budget": given.budget, "temperature": given.temperature}
    depths = _depths(given)
    how: dict[str, Any] = {"depths": DEPTHS if depths is None else depths, "kinds": given.kinds, "seed": given.seed}
    with _asked_model(given, **asked) as llm:
        summary = collect_runs(llm, made, questions, given.out, at_once=given.at_once, **how)
    print(f"{given.out}: {summary.done} runs done, {summary.before} before, {len(summary.refused)} left out")


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("traces", type=Path, help="a collection with hidden states, as `earlyexit collect` writes")
    parser.add_argument(
        "--label", choices=("full", "gold"), default="full", help="safe: the answer of full thinking, or the gold one"
    )
    parser.add_argument("--search", action="store_true", help="try layers, positions and sizes; else the paper's head")
    parser.add_argument("--kinds", nargs="+", default=None, help="learn from checks of these kinds only")
    parser.add_argument("--seed", type=int, default=0, help="of the split and of the first weights")
    parser.add_argument("--also", type=Path, nargs="+", default=[], help="other collections to judge the probe on")
    parser.add_argument("--push", default=None, metavar="REPO", help="also upload it to this hub repository")
    parser.add_argument("--out", type=Path, required=True, help="the probe, a directory")


def _train(given: argparse.Namespace) -> None:
    from langchain_earlyexit.lab.collect import read_meta
    from langchain_earlyexit.lab.train import assess, search, train

    heads = search(len(read_meta(given.traces)["depths"])) if given.search else None
    probe, report = train(given.traces, given.label, heads=heads, kinds=given.kinds, seed=given.seed, told=print)
    probe.save(given.out)
    print(f"\n{report}\n\n{probe!r} is in {given.out}")
    for other in given.also:
        print(f"\n{other}:\n{assess(probe, other, given.label, kinds=given.kinds)}")
    if given.push is not None:
        print(probe.push_to_hub(given.push))


# --- calibrate ----------------------------------------------------------------------------------------------------


def _calibrate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("traces", type=Path, help="a collection, as `earlyexit collect` writes")
    parser.add_argument("--policy", type=policy, required=True, help="deer, or CoDEStop(delta=0.5): its path is tried")
    parser.add_argument(
        "--epsilon", type=float, nargs="+", default=None, help="levels to certify; by default all that are possible"
    )
    parser.add_argument("--delta", type=float, default=0.1, help="chance that some level does not hold")
    parser.add_argument("--loss", default="answer_changed", help="answer_changed, or lost_correct (needs gold answers)")
    parser.add_argument("--again", type=Path, default=None, help="the same questions collected with another --seed")
    parser.add_argument("--out", type=Path, required=True, help="the artifact, a .json file")


def _calibrate(given: argparse.Namespace) -> None:
    from langchain_earlyexit.lab.certify import certify, summary

    found = certify(given.traces, given.policy, given.epsilon, given.delta, loss=given.loss, again=given.again)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    found.save(given.out)
    print(summary(found))


# --- answer -------------------------------------------------------------------------------------------------------


def _answer_arguments(parser: argparse.ArgumentParser) -> None:
    _asking_arguments(parser)
    parser.add_argument(
        "--policy", type=policy, default=None, help="deer, or DEER(threshold=0.97); none thinks to the end"
    )
    parser.add_argument("--budget", type=int, default=None, help="cap on thinking tokens; 0 for no thinking")
    parser.add_argument("--draft", action="store_true", help="ask with Chain-of-Draft's prompt")
    parser.add_argument("--probe", default=None, help="directory or hub id, for LYNX")
    parser.add_argument("--seed", type=int, default=0, help="the collection's, so that runs pair up")


def _answer(given: argparse.Namespace) -> None:
    from langchain_earlyexit.lab.datasets import load
    from langchain_earlyexit.lab.live import answer, arm_of

    questions = load(given.data, given.split, given.questions, given.seed)
    with _asked_model(given) as llm:
        arm = arm_of(given.policy, given.budget, given.draft)
        asked = {} if given.temperature is None else {"temperature": given.temperature}
        run = answer(llm, questions, arm, given.out, seed=given.seed, at_once=given.at_once, **asked)
    if not run.outcomes:
        raise ValueError("none of these questions can be asked; why is told above")
    spent = sum(outcome.output_tokens for outcome in run.outcomes) / len(run.outcomes)
    print(f"{run.arm}: {len(run.outcomes)} questions, {spent:.1f} output tokens each")


# --- evaluate and report ------------------------------------------------------------------------------------------


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("traces", type=Path, help="the collection to report on")
    parser.add_argument("--dev", type=Path, default=None, help="another collection, on which settings are chosen")
    parser.add_argument(
        "--policy", type=policy, nargs="+", default=[], metavar="POLICY", help="deer, 'CoDEStop(tau=12)', ..."
    )
    parser.add_argument("--live", type=Path, nargs="+", default=[], help="runs by `earlyexit answer` to put beside")
    parser.add_argument("--tolerance", type=float, default=0.005, help="accuracy on --dev that a setting may cost")
    parser.add_argument("--look", choices=("parallel", "wait"), default="parallel", help="as the live model looks")
    parser.add_argument("--out", type=Path, required=True, help="the evaluation, a .json file for `earlyexit report`")


def _evaluate(given: argparse.Namespace) -> None:
    from langchain_earlyexit.lab.collect import read_finished
    from langchain_earlyexit.lab.evaluate import chosen_on, evaluate
    from langchain_earlyexit.lab.live import read_live
    from langchain_earlyexit.lab.paths import path_of
    from langchain_earlyexit.lab.replays import Collection, curve
    from langchain_earlyexit.lab.report import markdown

    for path in filter(None, (given.traces, given.dev)):
        read_finished(path)
    test = Collection.read(given.traces, given.look)
    replayed = {repr(one): one for one in given.policy}
    paths: dict[tuple[Policy, ...], Policy] = {}
    for one in given.policy:
        try:
            paths.setdefault(path_of(one), one)
        except ValueError as error:
            print(f"replayed as it is, for it has no path of settings: {error}", file=sys.stderr)
    if given.dev is not None:
        dev = Collection.read(given.dev, given.look)
        dev.refuse_shared(test)
        replayed |= chosen_on(dev, list(paths.values()), given.tolerance)
    curves = [curve(test, type(one).__name__, path, "curve") for path, one in paths.items()]
    found = evaluate(test, replayed, [read_live(path) for path in given.live], curves)
    found.save(given.out)
    print(markdown(found))


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("evaluation", type=Path, help="a .json file of `earlyexit evaluate`")
    parser.add_argument("--out", type=Path, required=True, help="without an ending: .md, .html and .svg are written")


def _report(given: argparse.Namespace) -> None:
    from langchain_earlyexit.lab.report import write
    from langchain_earlyexit.lab.table import Evaluation

    for path in write(Evaluation.load(given.evaluation), given.out):
        print(path)


# --- overhead -----------------------------------------------------------------------------------------------------


def _overhead_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="pocket", help="pocket, a hub id, a directory, or one with a .gguf file")
    parser.add_argument("--probe", default=None, help="directory or hub id; by default the one beside the weights")
    parser.add_argument("--questions", type=positive, default=64, help="asked in every run")
    parser.add_argument("--at-once", type=positive, default=64, help="calls in flight; 1 for one after the other")
    parser.add_argument("--rounds", type=positive, default=9, help="pairs of runs, with and without the probe")


def _overhead(given: argparse.Namespace) -> None:
    from langchain_earlyexit.chat_models import ChatEarlyExit
    from langchain_earlyexit.lab.datasets import load
    from langchain_earlyexit.lab.overhead import overhead

    questions = [question.question for question in load("pocket", "dev", given.questions)]
    with ChatEarlyExit(model=given.model, probe=given.probe) as llm:
        print(overhead(llm, questions, given.rounds, at_once=given.at_once))


# --- headline -----------------------------------------------------------------------------------------------------


def _headline_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--questions", type=positive, default=2000, help="of the test split, to report on")
    parser.add_argument("--dev", type=positive, default=2000, help="of the dev split, to choose settings on")
    parser.add_argument("--chains", type=positive, default=5000, help="of the train split, for LYNX's probe")
    parser.add_argument("--tolerance", type=float, default=0.005, help="accuracy on dev that a setting may cost")
    parser.add_argument("--budgets", type=positive, nargs="+", default=None, help="fixed caps on thinking to run")
    parser.add_argument("--search", action="store_true", help="try many heads for the probe, not the paper's alone")
    parser.add_argument("--model", default="pocket", help="pocket, a hub id or a directory")
    parser.add_argument("--transfer", type=positive, default=250, help="of dev, at each other temperature")
    parser.add_argument("--rounds", type=positive, default=7, help="in which the probe's price is measured")
    parser.add_argument("--runs", type=Path, default=Path("runs/headline"), help="where what is done is kept")
    parser.add_argument("--out", type=Path, default=Path("docs/headline"), help="without an ending")
    parser.add_argument(
        "--write",
        action="store_true",
        help="also put the probe and a calibration beside the bundled weights, and the table into ./README.md",
    )


def _headline(given: argparse.Namespace) -> None:
    from langchain_earlyexit.lab.headline import BUDGETS, Plan, headline
    from langchain_earlyexit.lab.install import install, refuse_unwritable
    from langchain_earlyexit.lab.report import markdown, write

    if given.write:
        refuse_unwritable(given.model)
    names = ("questions", "dev", "chains", "transfer", "rounds", "model", "tolerance", "search", "runs")
    found = headline(Plan(**{name: getattr(given, name) for name in names}, budgets=tuple(given.budgets or BUDGETS)))
    found.evaluation.save(given.out.with_suffix(".json"))
    print(markdown(found.evaluation))
    for path in write(found.evaluation, given.out):
        print(path)
    if given.write:
        for line in install(found, given.out):
            print(line)


LAB: Final[tuple[Command, ...]] = (
    Command(
        "collect",
        "Think questions to the end, measure every signal at every check, and answer from each check as well.",
        _collect_arguments,
        _collect,
        """\
Each line of the file is a trace that replays as the model runs, so any policy and threshold can be tried on it:

  earlyexit collect --split train --questions 5000 --out runs/train.jsonl
  earlyexit collect --split dev --questions 2000 --depths --seed 1 --out runs/calibration.jsonl

Your own questions are lines of JSON: {"question": "...", "answer": "...", "form": "boxed"}. The form (boxed, choice,
text; boxed when not given) says how they are answered and compared, "options" makes a question multiple choice. They
are asked as they are: where answers are to be boxed, ask for that ("... put your final answer within \\boxed{}"), for
an answer without a box counts as changed wherever it is left. The right answer may be left out, for all or for none:
calibrate and train compare with full thinking; evaluate then tells how many answers stay the same, not how many are
right. Live calls are covered by the promise in the same form: give them answer_form="text" where these have it.

A promise is for calls that are asked as these are: same system prompt, sampling and budget. For settings that have no
flag here, such as max_tokens or stop, collect in Python: langchain_earlyexit.lab.collect.collect(llm, questions, out).

Policies that look at paragraphs or sentences (EAT, ThinkBrake) have a collection of their own, by --kinds.

Whole runs of an agent, so that one rule for all its steps can be certified on them, go into a folder. The rule holds
for graphs whose nodes hand on the answers of calls, not their whole messages. The graph is plan_and_solve, or made by
a function of your own that takes a model; --data plans are problems for the first:

  earlyexit collect --graph plan_and_solve --data plans --questions 400 --out runs/plans
  earlyexit collect --graph my_agent.py:make_graph --data questions.jsonl --out runs/mine

and then, in Python:

  from langchain_earlyexit import DEER, ChatEarlyExit
  from langchain_earlyexit.graph import create_plan_and_solve
  from langchain_earlyexit.lab.node_rules import Runs, certify_rule, rule_path

  found = certify_rule(Runs.read("runs/plans"), rule_path({"step": DEER()}), epsilon=0.1)
  llm = ChatEarlyExit(model="pocket")  # no exit_policy: nodes that the rule does not name think to the end
  solver = llm.bind(exit_policy=found.policy("step", llm), look="wait")
  graph = create_plan_and_solve(llm, solver=solver)
""",
    ),
    Command(
        "train",
        "Train LYNX's probe on a collection, and report how well it ranks checks it has not seen.",
        _train_arguments,
        _train,
        """\
Questions are split in three: to train on, to choose and stop by, and to report on. No gold answers are needed:

  earlyexit train runs/train.jsonl --search --out runs/probe
  earlyexit ask --probe runs/probe --policy lynx "What is 37 + 48 * 2 - 15?"
""",
    ),
    Command(
        "calibrate",
        "Find the setting of a policy that changes at most a share epsilon of the answers, and certify it.",
        _calibrate_arguments,
        _calibrate,
        """\
Each question counts once: what leaving at the policy's first exit would have answered, against full thinking.
With probability 1 - delta all levels of the artifact hold for new questions of the same kind, asked the same way. That
is for one calibration on one collection, made to its end, of questions that neither a probe was trained on nor a
setting was chosen on: trying policies until one certifies, or adding questions until it does, takes delta each time.

  earlyexit calibrate runs/calibration.jsonl --policy deer --epsilon 0.05 --delta 0.1 --out deer.json
""",
    ),
    Command(
        "answer",
        "Answer questions live, one way: the baselines and times that replay cannot know.",
        _answer_arguments,
        _answer,
        """\
Fixed budgets and no thinking, with the collection's seeds:

  for budget in 0 64 128 256; do earlyexit answer --questions 500 --budget $budget --out runs/budget-$budget.jsonl; done
""",
    ),
    Command(
        "evaluate",
        "Try policies and thresholds on collected traces, without the model.",
        _evaluate_arguments,
        _evaluate,
        """\
Accuracy, agreement with full thinking, every kind of token and exits by reason, with paired intervals:

  earlyexit evaluate runs/test.jsonl --dev runs/dev.jsonl --policy deer codestop --live runs/budget-*.jsonl \\
    --out runs/evaluation.json
""",
    ),
    Command(
        "report",
        "Write an evaluation as Markdown, one self-contained HTML file, and a plot.",
        _report_arguments,
        _report,
    ),
    Command(
        "overhead",
        "Measure what LYNX's probe costs when it never leaves: interleaved runs with and without it.",
        _overhead_arguments,
        _overhead,
        """\
One request at a time, and 64 at once:

  earlyexit overhead --questions 6 --at-once 1
  earlyexit overhead --probe runs/probe
""",
    ),
    Command(
        "headline",
        "All policies side by side, live, on held-out questions of the bundled model.",
        _headline_arguments,
        _headline,
        """\
Settings are chosen on dev, LYNX's probe is trained on chains of the train split, nothing is tuned on test.
Two processes share the work; an interrupted run goes on. A try of some minutes:

  earlyexit headline --questions 100 --dev 100 --chains 200 --transfer 20 --rounds 1 --out runs/headline-try
""",
    ),
)
