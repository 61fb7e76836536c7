"""Train the hidden-state head of LYNX (arXiv 2512.05325) on a collection, and say honestly how well it ranks.

What is learned is whether leaving at a check gives the answer of full thinking (no gold needed), or the right one. One
part of the questions trains the head, one stops and chooses, and one that neither saw is reported on, beside the plain
confidence of a trial answer on the same checks: that is what a probe has to beat, or to replace at no trial's cost.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from langchain_earlyexit.lab.examples import PARTS, Bools, Examples, examples
from langchain_earlyexit.lab.statistics import auroc
from langchain_earlyexit.probe import POSITIONS, Probe


@dataclass(frozen=True)
class Head:
    """One choice of what the head reads and how large it is.

    `layers` are indices into the depths of the collection; `hidden` the widths of the hidden layers, none for logistic
    regression.
    """

    layers: tuple[int, ...]
    position: str = "cue"
    hidden: tuple[int, ...] = (256, 64)


@dataclass(frozen=True)
class Ranking:
    """How well a score tells safe checks from others: AUROC over all checks, and over the first of each chain.

    NaN where there are no safe ones, or no others.
    """

    all_checks: float
    first_checks: float


@dataclass(frozen=True)
class Report:
    """What was trained and how well it does on questions that took no part in it.

    Attributes:
        label: one of `LABELS`.
        checks: rows by part.
        questions: in all.
        safe: share of safe checks in the test part.
        probe: the head's ranking of the test part.
        trial_confidence: that of the trial answer's confidence, on the same checks.
        log_loss: of `p_safe` on the test part, in nats, and of the constant that is the share of safe checks there.
        chosen: the head.
        tried: each head that was tried and its AUROC on the part that chooses, best first.
    """

    label: str
    checks: Mapping[str, int]
    questions: int
    safe: float
    probe: Ranking
    trial_confidence: Ranking
    log_loss: tuple[float, float]
    chosen: Head
    tried: tuple[tuple[Head, float], ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        return asdict(self)

    def __str__(self) -> str:
        rows = ", ".join(f"{count} to {part}" for part, count in self.checks.items())
        lines = [
            f"{self.questions} questions; checks: {rows}; {self.safe:.1%} of the tested ones are safe to leave",
            f"{'AUROC on test questions':28} {'all checks':>10} {'first checks':>13}",
        ]
        for name, ranking in (("p_safe", self.probe), ("trial_confidence", self.trial_confidence)):
            lines.append(f"{name:28} {ranking.all_checks:10.3f} {ranking.first_checks:13.3f}")
        lines.append(f"log loss of p_safe {self.log_loss[0]:.3f}, of the base rate {self.log_loss[1]:.3f}")
        lines += [f"  {score:.3f}  {head}" for head, score in self.tried]
        return "\n".join(lines)


# --- training -----------------------------------------------------------------------------------------------------


def train(
    out: str | os.PathLike[str],
    label: str = "full",
    *,
    heads: Sequence[Head] | None = None,
    kinds: Collection[str] | None = None,
    seed: int = 0,
    told: Callable[[str], None] | None = None,
) -> tuple[Probe, Report]:
    """Train one head or several on a collection, and keep the one that ranks the questions set aside for choosing best.

    Args:
        out: the file of traces, see `collect`.
        label: one of `LABELS`.
        heads: what to try; all collected layers at the cue with the paper's two hidden layers when None. See `search`.
        kinds: only checks of these; all when None.
        seed: of the split, the first weights and the order of batches.
        told: called with a line for each head that is done.

    Raises:
        ValueError: nothing to learn from: no states, or checks of one class only in a part.
    """
    data = examples(out, label, kinds=kinds, seed=seed)
    _refuse_one_class(data)
    heads = heads or (Head(tuple(range(len(data.depths)))),)
    tried: list[tuple[Head, float]] = []
    best: tuple[float, Head, Probe] | None = None
    for head in heads:
        probe = fit(data, head, seed)
        score = auroc(p_safe(probe, data)[data.part == "choose"].tolist(), data.safe[data.part == "choose"].tolist())
        tried.append((head, score))
        if told is not None:
            told(f"{score:.3f}  {head}")
        if best is None or score > best[0]:
            best = (score, head, probe)
    assert best is not None  # noqa: S101 - there is at least one head
    report = _report(data, label, best[2], best[1], tuple(sorted(tried, key=lambda pair: -pair[1])))
    about = {"model": data.model, "label": label, "report": _plain(report.to_dict()), "learned": list(data.learned)}
    return replace(best[2], about=about), report


def search(depths: int) -> list[Head]:
    """Heads worth trying on so many depths: each alone, the last two, all; at two positions; in three sizes."""
    sets: list[tuple[int, ...]] = [(i,) for i in range(depths)]
    sets += [tuple(range(first, depths)) for first in sorted({0, depths - 2}) if 0 <= first < depths - 1]
    sizes: tuple[tuple[int, ...], ...] = ((), (64,), (256, 64))
    return [Head(layers, position, size) for layers in sets for position in POSITIONS for size in sizes]


def assess(
    probe: Probe, out: str | os.PathLike[str], label: str = "full", *, kinds: Collection[str] | None = None
) -> Report:
    """How well a head does on a collection that it was not trained on: another task, or another temperature.

    Raises:
        ValueError: a collection of another model, or without the layers that the probe reads.
    """
    data = examples(out, label, kinds=kinds)
    probe.refuse_mismatch(data.binds)
    data = replace(data, part=np.full(len(data.safe), "test"))
    return _report(data, label, probe, _head_of(probe, data.depths), ())


def p_safe(probe: Probe, data: Examples) -> NDArray[np.float64]:
    """`probe.p_safe` of every row."""
    picked = _picked(data, _head_of(probe, data.depths))
    return np.array([probe.p_safe(row) for row in picked], dtype=np.float64)


def _head_of(probe: Probe, depths: Sequence[float]) -> Head:
    missing = [depth for depth in probe.layers if depth not in depths]
    if missing:
        raise ValueError(f"the probe reads the depths {missing}, but the collection holds {list(depths)}")
    return Head(tuple(depths.index(depth) for depth in probe.layers), probe.position)


def _picked(data: Examples, head: Head) -> NDArray[np.float32]:
    """[rows, layers, width] of what a head reads."""
    return data.states[:, POSITIONS.index(head.position)][:, list(head.layers)]


def _refuse_one_class(data: Examples) -> None:
    for part in PARTS:
        safe = data.safe[data.part == part]
        if not safe.any() or safe.all():
            kind = "none" if not len(safe) else "all safe" if safe.all() else "none safe"
            raise ValueError(
                f"the {len(safe)} checks to {part} are {kind}: a head cannot be learned or judged on that; collect "
                "more questions"
            )


_EPOCHS: Final = 200
_PATIENCE: Final = 10
_BATCH: Final = 256
_RATE: Final = 1e-3
_DECAY: Final = 1e-2


def fit(data: Examples, head: Head, seed: int = 0) -> Probe:
    """One head: standardised, classes weighing alike, stopped when choosing checks get no better, then calibrated."""
    features = _picked(data, head).reshape(len(data.safe), -1)
    training = data.part == "train"
    mean = features[training].mean(axis=0)
    scale = features[training].std(axis=0)
    scale[scale < 1e-6] = 1.0  # a feature that never moves says nothing
    x = torch.from_numpy((features - mean) / scale)
    y = torch.from_numpy(data.safe.astype(np.float32))
    rows = {part: torch.from_numpy(np.flatnonzero(data.part == part)) for part in PARTS}
    share = y[rows["train"]].mean()
    weight = torch.where(y > 0, 0.5 / share, 0.5 / (1 - share))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _perceptron(x.shape[1], head.hidden)
    _learn(model, x, y, weight, rows["train"], rows["choose"], torch.Generator().manual_seed(seed))
    layers = [part for part in model if isinstance(part, nn.Linear)]
    with torch.inference_mode():
        slope, shift = _calibration(model(x[rows["choose"]])[:, 0], y[rows["choose"]])
        layers[-1].weight.mul_(slope)
        layers[-1].bias.mul_(slope).add_(shift)
        return Probe(
            layers=tuple(data.depths[i] for i in head.layers),
            position=head.position,
            mean=mean,
            scale=scale,
            weights=tuple(layer.weight.T.contiguous().numpy() for layer in layers),
            biases=tuple(layer.bias.numpy().copy() for layer in layers),
            binds=data.binds,
        )


def _perceptron(inputs: int, hidden: Sequence[int]) -> nn.Sequential:
    parts: list[nn.Module] = []
    for width in hidden:
        parts += [nn.Linear(inputs, width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*parts, nn.Linear(inputs, 1))


def _learn(
    model: nn.Sequential, x: Tensor, y: Tensor, weight: Tensor, train: Tensor, choose: Tensor, order: torch.Generator
) -> None:
    """Adam with weight decay until the weighted log loss of the choosing part has not fallen for a while."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=_DECAY)

    def loss(rows: Tensor) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(model(x[rows])[:, 0], y[rows], weight=weight[rows])

    best, kept, since = float("inf"), model.state_dict(), 0
    for _ in range(_EPOCHS):
        model.train()
        for batch in torch.split(train[torch.randperm(len(train), generator=order)], _BATCH):
            optimizer.zero_grad()
            loss(batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        model.eval()
        with torch.inference_mode():
            now = float(loss(choose))
        if now < best - 1e-4:
            best, since = now, 0
            kept = {name: value.clone() for name, value in model.state_dict().items()}
        else:
            since += 1
            if since >= _PATIENCE:
                break
    model.load_state_dict(kept)


def _calibration(logits: Tensor, y: Tensor) -> tuple[float, float]:
    """Slope and shift that make the logits log odds: logistic regression on one number, by Newton's method (Platt).

    The classes weighed alike while the head learned, so its raw output is not yet a probability.
    """
    z, truth = logits.double().numpy(), y.double().numpy()
    features = np.stack([z, np.ones_like(z)])
    prior, ridge = np.array([1.0, 0.0]), np.array([_RIDGE, 0.0])

    def loss(at: NDArray[np.float64]) -> float:
        margin = at @ features
        return float((np.logaddexp(0, margin) - truth * margin).sum() + 0.5 * (ridge * (at - prior) ** 2).sum())

    at, now = prior, loss(prior)
    for _ in range(100):
        p = np.exp(-np.logaddexp(0, -(at @ features)))
        gradient = features @ (p - truth) + ridge * (at - prior)
        hessian = (features * np.maximum(p * (1 - p), 1e-9)) @ features.T + np.diag(ridge)
        step = np.linalg.solve(hessian, gradient)
        while (then := loss(at - step)) > now and np.abs(step).max() > 1e-9:  # a whole step may overshoot
            step = step / 2
        if now - then < 1e-9:
            break
        at, now = at - step, then
    slope, shift = at
    # A negative slope would turn the ranking round: the head knows nothing then, and its order is left as it is.
    return max(float(slope), 1e-3), float(shift)


_RIDGE: Final = 1.0
"""Pulls the slope to 1: a head that separates few choosing checks perfectly would else be made infinitely sure."""


# --- reporting ----------------------------------------------------------------------------------------------------


def _report(data: Examples, label: str, probe: Probe, head: Head, tried: tuple[tuple[Head, float], ...]) -> Report:
    test = data.part == "test"
    score = p_safe(probe, data)[test]
    safe = data.safe[test]
    base = float(safe.mean())
    clipped = np.clip(score, 1e-7, 1 - 1e-7)
    return Report(
        label=label,
        checks={part: int((data.part == part).sum()) for part in PARTS},
        questions=data.questions,
        safe=base,
        probe=ranking(score, safe, data.first[test]),
        trial_confidence=ranking(data.confidence[test], safe, data.first[test]),
        log_loss=(_log_loss(clipped, safe), _log_loss(np.full(len(safe), np.clip(base, 1e-7, 1 - 1e-7)), safe)),
        chosen=head,
        tried=tried,
    )


def ranking(score: NDArray[np.float64], safe: Bools, first: Bools) -> Ranking:
    """How well `score` ranks these checks, those where it is not finite aside."""
    finite = np.isfinite(score)
    return Ranking(*(auroc(score[rows].tolist(), safe[rows].tolist()) for rows in (finite, finite & first)))


def _log_loss(p: NDArray[np.float64], safe: Bools) -> float:
    return float(-np.where(safe, np.log(p), np.log1p(-p)).mean())


def _plain(data: Any) -> Any:
    """JSON data: NaN becomes None."""
    if isinstance(data, Mapping):
        return {name: _plain(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return [_plain(value) for value in data]
    return None if isinstance(data, float) and np.isnan(data) else data
