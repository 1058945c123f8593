"""What joins the stages: the output from all stages' heads, and the gradients of ``x`` and of the weights.

``y`` and ``dx`` are sums over all heads. Adding a stage's share to a running sum would round once a stage, or hold the
sum in float32; instead the stages' heads are kept in their own dtype until all are there, and each tile of rows then
takes one matrix product over all of them. That is both the smallest and the most accurate way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtitan_upipe.cp.head_schedule import HeadSchedule, Stage
from torchtitan_upipe.cp.shards import runs
from torchtitan_upipe.cp.stage import KVBlock, StageLayer
from torchtitan_upipe.cp.strategy import AttentionWeights
from torchtitan_upipe.kernels.contract import accumulate_dtype
from torchtitan_upipe.kernels.visibility import Interval
from torchtitan_upipe.stash.stash import Kept, PutAway, Stash, read_ahead
from torchtitan_upipe.tiled.rows import ALL_ROWS, Rows
from torchtitan_upipe.tiled.tiles import add_weight_gradient

PROJECTIONS = ("wq", "wk", "wv")
BIASES = ("bq", "bk", "bv")


def project_out(
    stash: Stash, schedule: HeadSchedule, tiles: Sequence[Interval], x: Rows, wo: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """The layer's output from the stages' outputs in ``stash``: rows, and ``y [B, rows, D]`` for them.

    Args:
        stash: has ``o`` of every stage and tile.
        schedule: the stages.
        tiles: rows of each query tile.
        x: the layer's input, for its shape, dtype and how many rows at a time.
        wo: ``[D, H*d]``.
    """
    slices = [(t, start, rows) for t, (start, stop) in enumerate(tiles) for rows in x.small_parts(start, stop)]
    outputs = stash.outputs(
        ((s, t), slice(rows.start - start, rows.stop - start))
        for t, start, rows in slices
        for s in range(len(schedule.stages))
    )

    def heads(rows: slice) -> Tensor:
        joined = wo.new_empty(x.shape[0], rows.stop - rows.start, wo.shape[1])  # [B, rows, H*d]
        by_head = joined.unflatten(-1, (schedule.num_heads, -1))
        for stage in schedule.stages:
            _put_heads(by_head, stage.queries.distinct, next(outputs))
        return joined

    return ((rows, F.linear(heads(rows), wo)) for _, _, rows in slices)


@dataclass
class LayerGradients:
    """Gradients of ``x [B, N, D]`` and of the weights, collected stage by stage.

    The heads' gradients wait for one pass over all heads (:meth:`heads`, :meth:`project_back`) where the stash has put
    the stages' outputs: each takes the place that an output has left. Gradients of weights are sums in float32, made
    when the first share comes.
    """

    x: Rows
    weights: AttentionWeights
    head_dim: int
    put_away: PutAway
    sums: dict[str, Tensor] = field(default_factory=dict)
    _heads: list[tuple[str, tuple[int, ...], Kept]] = field(default_factory=list)

    def of_rows(self, x: Rows) -> LayerGradients:
        """Collects for the tokens ``x`` alone, the weights' gradients in the same sums."""
        return replace(self, x=x, _heads=[])

    def add_projection(self, name: str, heads: tuple[int, ...], grad: Tensor) -> None:
        """``grad [B, N, n, d]`` of the projection ``name`` (``"wq"``, ``"wk"``, ``"wv"``) of ``heads``; it is kept."""
        self.settle()
        self._heads.append((name, heads, self.put_away(grad)))

    def settle(self) -> None:
        """No heads' gradient takes memory on the device any more, unless the device is where it is kept."""
        if self._heads:
            self._heads[-1][-1].settle()

    def add_queries(self, layer: StageLayer, stage: Stage, dq: Tensor) -> None:
        """``dq [B, N, U, d]`` of the stage's queries, before RoPE and norm are undone; it is overwritten and kept."""
        projected = None if self.weights.q_norm is None else layer.project("q", stage.queries)
        dq, d_norm = layer.transform.vjp_(dq, projected, self.weights.q_norm, ALL_ROWS)
        self.add_norm("q_norm", d_norm)
        self.add_projection("wq", stage.queries.distinct, dq)

    def add_keys(self, layer: StageLayer, stage: Stage, kv: dict[int, KVBlock]) -> None:
        """At the end of a KV set: its ``dk``, then its ``dv``, to the tokens' owners; its blocks leave ``kv``."""
        if not any(stage.release.counts):
            return
        released = stage.release.distinct
        leaving = [kv.pop(block) for block in stage.leave[layer.exchange.rank]]
        dks, dvs = [b.dk for b in leaving if b.dk is not None], [b.dv for b in leaving if b.dv is not None]
        del leaving
        dk = layer.release(stage, dks)  # [B, N, n, d]
        projected = None if self.weights.k_norm is None else layer.project("k", stage.release)
        dk, d_norm = layer.transform.vjp_(dk, projected, self.weights.k_norm, ALL_ROWS)
        self.add_projection("wk", released, dk)
        self.add_norm("k_norm", d_norm)
        del dk, projected
        self.add_projection("wv", released, layer.release(stage, dvs))

    def add_output(self, heads: Sequence[int], o: Tensor, dy: Rows, rows: slice) -> None:
        """Add to the columns of ``dWo`` of ``heads``, from ``o [B, n, h, d]`` and ``dy[:, rows]``, ``[B, n, D]``."""
        d_weight = self._sum("wo", self.weights.wo).unflatten(1, (-1, self.head_dim))  # [D, H, d], a view
        parts = dy.parts(rows)
        for at, d_part in zip(parts, dy.read(parts), strict=True):
            o_part = o[:, at.start - parts[0].start : at.stop - parts[0].start]
            d_columns = d_part.flatten(0, 1).t() @ o_part.flatten(0, 1).flatten(1)  # [D, h*d]
            for source, target in runs(heads):
                d_weight[:, target] += d_columns.unflatten(1, (-1, self.head_dim))[:, source]

    def add_norm(self, name: str, grad: Tensor | None) -> None:
        """``grad [d]`` of ``q_norm`` or ``k_norm``, or None where the model has none."""
        if grad is not None:
            self._sum(name, grad).add_(grad)

    def _sum(self, name: str, like: Tensor) -> Tensor:
        if name not in self.sums:
            self.sums[name] = torch.zeros_like(like, dtype=accumulate_dtype(like.dtype))
        return self.sums[name]

    def weight(self, name: str) -> Tensor | None:
        """The gradient of weight ``name`` in its dtype, or None where the model has no such weight; call it once."""
        weight: Tensor | None = getattr(self.weights, name)
        if weight is None:
            return None
        for stacked, names in (("projections", PROJECTIONS), ("biases", BIASES)):
            if name in names:
                return self.sums[stacked].split(self._sizes())[names.index(name)].to(weight.dtype)
        return self.sums.pop(name).to(weight.dtype)

    def heads(self, slices: Sequence[slice]) -> Iterator[Tensor]:
        """Gradients of all stages' query, key and value heads, ``[B, rows, (H + 2*G)*d]``, of each of ``slices``."""
        self.settle()
        grads = read_ahead((kept, rows) for rows in slices for _, _, kept in self._heads)

        def joined(rows: slice) -> Tensor:
            heads = self.weights.wq.new_zeros(self.x.shape[0], rows.stop - rows.start, sum(self._sizes()))
            targets = dict(zip(PROJECTIONS, heads.split(self._sizes(), dim=-1), strict=True))
            for name, placed, _ in self._heads:
                _put_heads(targets[name].unflatten(-1, (-1, self.head_dim)), placed, next(grads), add=name != "wq")
            return heads

        return (joined(rows) for rows in slices)

    def project_back(self, heads: Tensor, x: Tensor) -> Tensor:
        """``dx`` of some tokens ``x [B, n, D]``, from what :meth:`heads` gives for them; adds to ``dWq, dWk, dWv``.

        One product over all heads: what stages would each add to a running sum, it would round once a stage.
        """
        flat = heads.flatten(0, 1)  # [B*n, (H + 2*G)*d]
        add_weight_gradient(self._sum("projections", self.stacked), flat, x.flatten(0, 1))
        if any(getattr(self.weights, name) is not None for name in BIASES):
            total = self._sum("biases", flat[0])
            total += flat.sum(0, dtype=total.dtype)
        return (flat @ self.stacked).unflatten(0, heads.shape[:2])

    @cached_property
    def stacked(self) -> Tensor:
        """``wq, wk, wv`` in one: ``[(H + 2*G)*d, D]``."""
        return torch.cat([getattr(self.weights, name) for name in PROJECTIONS])

    def _sizes(self) -> list[int]:
        return [getattr(self.weights, name).shape[0] for name in PROJECTIONS]

    def input(self) -> Tensor:
        """``dx [B, N, D]`` on the device; adds to ``dWq, dWk, dWv``."""
        dx = torch.empty(self.x.shape, dtype=self.x.dtype, device=self.x.device)
        slices = self.x.small_parts(0, self.x.shape[1])
        heads, xs = self.heads(slices), self.x.read(slices)
        for rows in slices:
            dx[:, rows] = self.project_back(next(heads), next(xs))
        return dx


def _put_heads(target: Tensor, heads: Iterable[int], source: Tensor, add: bool = False) -> None:
    """Write ``source [B, n, h, d]`` to the heads ``heads`` of ``target [B, n, H, d]``, or add it to them."""
    for at, to in runs(tuple(heads)):
        if add:
            target[:, :, to] += source[:, :, at]
        else:
            target[:, :, to] = source[:, :, at]
