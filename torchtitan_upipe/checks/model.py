"""Two layers over two steps: what is logged, and every gradient, equal one rank's; no token changes an earlier one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchtitan_upipe.checks.one_rank import OneRank, whole_tensors
from torchtitan_upipe.checks.report import Hosts, Verdict
from torchtitan_upipe.checks.short import STEPS, Batch, ShortTrainer, evaluating, inputs_of
from torchtitan_upipe.data.sharding import chunk_of, degrees, shard_positions
from torchtitan_upipe.job.shape import job_shape


@dataclass(frozen=True)
class Tolerance:
    """Relative differences from one rank's float32 numbers that are left to rounding.

    Attributes:
        loss, grad_norm: of the logged numbers, which means over many tokens keep near.
        gradient: of a weight's gradient, beside :attr:`plain`.
        plain: multiple of the error that plain low precision makes on one rank.
    """

    loss: float
    grad_norm: float
    gradient: float
    plain: float


WIDE = Tolerance(loss=1e-5, grad_norm=1e-4, gradient=1e-4, plain=0.0)
NARROW = Tolerance(loss=2e-3, grad_norm=2e-2, gradient=2e-3, plain=2.0)


@dataclass
class StepFound:
    """One step on one rank: the job's logged numbers, one rank's, and relative errors of gradients by weight."""

    loss: float
    grad_norm: float
    one_loss: float
    one_grad_norm: float
    errors: dict[str, float] = field(default_factory=dict)
    plain: dict[str, float] = field(default_factory=dict)


def measure_steps(trainer: ShortTrainer) -> tuple[Tolerance, list[StepFound]]:
    """Two steps of the job and, on every rank, of one rank alone."""
    one, tolerance = OneRank(trainer), _tolerance(trainer)
    found = []
    for number in range(STEPS):
        batch = trainer.draw(seed=number)
        if (
            tolerance.plain
        ):  # Adam's first step has the sign of a gradient, which rounding turns around where it is near 0
            one.take_weights()
        truth = one.forward_backward(batch)
        plain = one.forward_backward(batch, one.narrowed(torch.bfloat16)).gradients if tolerance.plain else {}
        errors = _errors_of_step(trainer, batch, truth.gradients)
        loss, grad_norm = trainer.logged[-1]
        of_plain = {name: _distance(plain[name], truth.gradients[name]) for name in plain}
        found.append(StepFound(loss, grad_norm, truth.loss, truth.grad_norm, errors, of_plain))
        one.update()
    return tolerance, found


def judge_steps(findings: list[tuple[Tolerance, list[StepFound]]], hosts: Hosts) -> Verdict:
    """Name the numbers that are not one rank's, and the ranks that say so."""
    tolerance, steps = findings[0]
    failures = []
    for number in range(len(steps)):
        on_ranks = [found[number] for _, found in findings]
        for name, allowed in (("loss", tolerance.loss), ("grad_norm", tolerance.grad_norm)):
            pairs = [(getattr(found, name), getattr(found, f"one_{name}")) for found in on_ranks]
            off = [rank for rank, (got, one) in enumerate(pairs) if not abs(got - one) <= allowed * abs(one)]
            if off:
                got, one = pairs[off[0]]
                failures.append(
                    f"step {number + 1}: the logged {name} is {got:.8g} and one rank's {one:.8g}, further apart than "
                    f"{allowed:g} of it, on {hosts.of(off)}."
                )
        failures += _wrong_gradients(number, on_ranks, tolerance, hosts)
    worst = max(max(step.errors.values(), default=0.0) for step in steps)
    apart = max(abs(step.loss - step.one_loss) / abs(step.one_loss) for step in steps)
    plain = max((max(step.plain.values(), default=0.0) for step in steps), default=0.0)
    own = f" (plain bfloat16 on one rank: {plain:.1e})" if plain else ""
    return Verdict(f"losses within {apart:.1e} of one rank's, gradients within {worst:.1e}{own}", failures)


def _wrong_gradients(number: int, steps: list[StepFound], tolerance: Tolerance, hosts: Hosts) -> list[str]:
    off: dict[str, list[int]] = {}
    for rank, step in enumerate(steps):
        for name, error in step.errors.items():
            if not error <= tolerance.gradient + tolerance.plain * step.plain.get(name, 0.0):
                off.setdefault(name, []).append(rank)
    if not off:
        return []
    ranks = sorted({rank for found in off.values() for rank in found})
    name = max(off, key=lambda name: steps[off[name][0]].errors[name])
    return [
        f"step {number + 1}: gradients of {len(off)} weights are not one rank's, the furthest that of {name}, off by "
        f"{steps[off[name][0]].errors[name]:.1e} of its norm, on {hosts.of(ranks)}."
    ]


def _tolerance(trainer: ShortTrainer) -> Tolerance:
    job = job_shape(trainer.job_config, trainer.parallel_dims.world_size)
    return WIDE if min(job.element, job.stored, job.reduced) >= 4 else NARROW


def _errors_of_step(trainer: ShortTrainer, batch: Batch, truth: dict[str, Tensor]) -> dict[str, float]:
    """Take a step; relative errors of its gradients by weight, before the optimizer has them."""
    errors: dict[str, float] = {}

    def compare(*_: Any) -> None:
        errors.update({name: _distance(got, truth[name]) for name, got in whole_tensors(trainer, "gradients")})

    (optimizer,) = trainer.optimizers
    hook = optimizer.register_step_pre_hook(compare)
    trainer.step_on(batch)
    hook.remove()
    return errors


def _distance(got: Tensor, truth: Tensor) -> float:
    return float((got.float() - truth.float()).norm() / truth.float().norm().clamp(min=1e-30))


@dataclass(frozen=True)
class Leak:
    """A token that must not have changed and has, or one that should have and has not."""

    sequence: int
    token: int
    changed: int


def measure_leaks(trainer: ShortTrainer) -> tuple[int, list[Leak]]:
    """Change tokens one by one; compare this rank's logits to the bit with those before.

    Returns:
        The tokens compared, and what is wrong.
    """
    batch = trainer.own(trainer.draw(seed=STEPS))
    batch = batch.rows(0, trainer.job_config.training.local_batch_size)
    length = batch.tokens.shape[1]
    positions = _positions(trainer, length)
    starts = batch.starts.cumsum(dim=1)  # number of each token's document
    leaks, (model,) = [], trainer.model_parts
    with evaluating(model), trainer.maybe_enable_amp:
        before = _logits(trainer, batch)
        for token in (length // 6, length // 2, length - 2):
            after = _logits(trainer, batch.changed(token, trainer.vocabulary))
            differs = (after != before).any(dim=-1).cpu()  # [B, N]
            for row in range(len(differs)):
                for at, changed in zip(positions.tolist(), differs[row].tolist(), strict=True):
                    sees = at >= token and at < length and starts[row, at] == starts[row, token]
                    if (changed and not sees and at < length) or (at == token and not changed):
                        leaks.append(Leak(row, at, token))
    return len(positions) * 3 * len(batch.tokens), leaks


def judge_leaks(findings: list[tuple[int, list[Leak]]], hosts: Hosts) -> Verdict:
    """Name the ranks whose tokens saw what they must not."""
    failures = []
    for blind in (False, True):
        found = {
            rank: [leak for leak in leaks if (leak.token == leak.changed) == blind]
            for rank, (_, leaks) in enumerate(findings)
        }
        ranks = [rank for rank, leaks in found.items() if leaks]
        if ranks:
            first = found[ranks[0]][0]
            count = sum(len(leaks) for leaks in found.values())
            failures.append(
                f"a token's own logits stay when it changes ({count} times, first token {first.token}), on "
                f"{hosts.of(ranks)}."
                if blind
                else f"{count} logits change with a token that they must not see, first those of token {first.token} "
                f"of sequence {first.sequence} with token {first.changed}, on {hosts.of(ranks)}."
            )
    compared = sum(count for count, _ in findings)
    return Verdict(f"{compared:,} logits of tokens compared to the bit after changes of tokens", failures)


def _positions(trainer: ShortTrainer, length: int) -> Tensor:
    """Where this rank's tokens stand in their sequence, padding behind its end."""
    cp, mesh = trainer.job_config.context_parallel, trainer.parallel_dims.get_optional_mesh("cp")
    if mesh is None:
        return torch.arange(length)
    ulysses, ring = degrees(cp.method, mesh.size(), cp.ring_degree)
    padded = job_shape(trainer.job_config, trainer.parallel_dims.world_size).length
    chunk = chunk_of(cp.method, mesh.size(), cp.sequence_chunk)
    return shard_positions(padded, mesh.get_local_rank(), ulysses, ring, chunk)


def _logits(trainer: ShortTrainer, batch: Batch) -> Tensor:
    given: Any = {k: v.to(trainer.device) for k, v in inputs_of(batch, trainer.documents).items()}
    inputs, _, extra, kwargs = trainer.post_dataloading_process(given, batch.labels.to(trainer.device))
    result: Tensor = trainer.model_parts[0](inputs, **extra, **kwargs)
    return result
