"""What joins the stages: the output from all stages' heads, and the gradients of ``x`` and of the weights.

``y`` and ``dx`` are sums over all heads. Adding a stage's share to a running sum would round once a stage, or hold the
sum in float32; instead the stages' heads are kept in their own dtype until all are there, and each tile of rows then
takes one matrix product over all of them. That is both the smallest and the most accurate way.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtitan_upipe.cp.head_schedule import HeadSchedule, Stage
from torchtitan_upipe.cp.shards import runs
from torchtitan_upipe.cp.stage import ALL_ROWS, KVBlock, StageLayer
from torchtitan_upipe.cp.strategy import AttentionWeights
from torchtitan_upipe.kernels.contract import accumulate_dtype
from torchtitan_upipe.kernels.visibility import Interval
from torchtitan_upipe.stash.stash import Kept, PutAway, Stash, read_ahead
from torchtitan_upipe.tiled.tiles import row_slices

ROWS = 8192  # tokens of one matrix product over all heads
PROJECTIONS = ("wq", "wk", "wv")
BIASES = dict(zip(PROJECTIONS, ("bq", "bk", "bv"), strict=True))
SUMMED = ("wo", "q_norm", "k_norm", *BIASES.values())  # gradients to which every query tile adds: kept in float32


def project_out(stash: Stash, schedule: HeadSchedule, tiles: Sequence[Interval], x: Tensor, wo: Tensor) -> Tensor:
    """The layer's output ``y [B, N, D]``, like ``x``, from the stages' outputs in ``stash``; ``wo [D, H*d]``."""
    y = torch.empty_like(x)
    slices = [(t, start, rows) for t, (start, stop) in enumerate(tiles) for rows in row_slices(start, stop, ROWS)]
    outputs = stash.outputs(
        ((s, t), slice(rows.start - start, rows.stop - start))
        for t, start, rows in slices
        for s in range(len(schedule.stages))
    )
    for _, _, rows in slices:
        heads = x.new_empty(x.shape[0], rows.stop - rows.start, wo.shape[1])  # [B, rows, H*d]
        by_head = heads.unflatten(-1, (schedule.num_heads, -1))
        for stage in schedule.stages:
            _put_heads(by_head, stage.queries.distinct, next(outputs))
        y[:, rows] = F.linear(heads, wo)
    return y


@dataclass
class LayerGradients:
    """Gradients of ``x [B, N, D]`` and of the weights, collected stage by stage.

    Rows of the weight gradients are written where they belong. The heads' gradients wait for ``dx`` where the stash has
    put the stages' outputs: each takes the place that an output has left. Of the weights' gradients, those ``summed``
    are kept in float32, and those of ``others`` in the weights' dtype.
    """

    x: Tensor
    weights: AttentionWeights
    head_dim: int
    put_away: PutAway
    summed: Collection[str] = SUMMED
    others: Collection[str] = PROJECTIONS
    weight_grads: dict[str, Tensor] = field(default_factory=dict)
    _heads: list[tuple[str, tuple[int, ...], Kept]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, weight in vars(self.weights).items():
            if weight is None or name in self.weight_grads:
                continue
            if name in self.summed:
                self.weight_grads[name] = torch.zeros_like(weight, dtype=accumulate_dtype(weight.dtype))
            elif name in self.others:
                self.weight_grads[name] = torch.zeros_like(weight)

    def of_rows(self, rows: slice) -> LayerGradients:
        """Collects for the tokens ``rows`` alone, the weights' gradients in the same tensors."""
        return replace(self, x=self.x[:, rows], _heads=[])

    def add_projection(self, name: str, heads: tuple[int, ...], grad: Tensor) -> None:
        """``grad [B, N, n, d]`` of the projection ``name`` (``"wq"``, ``"wk"``, ``"wv"``) of ``heads``; it is kept."""
        flat = grad.flatten(0, 1).flatten(1)  # [B*N, n*d]
        d_rows = (flat.t() @ self.x.flatten(0, 1)).unflatten(0, (-1, self.head_dim))  # [n, d, D]
        d_weight = self.weight_grads[name].unflatten(0, (-1, self.head_dim))  # [H, d, D], a view
        for source, target in runs(heads):
            d_weight[target] += d_rows[source]
        self._add_bias(BIASES[name], heads, grad)
        self.settle()
        self._heads.append((name, heads, self.put_away(grad)))

    def _add_bias(self, name: str, heads: tuple[int, ...], grad: Tensor) -> None:
        """Add the sum over tokens of ``grad [B, N, n, d]``, in float32, to the bias ``name`` if the model has it."""
        if name in self.weight_grads:
            d_bias = self.weight_grads[name].unflatten(0, (-1, self.head_dim))  # [H, d], a view
            d_heads = grad.sum((0, 1), dtype=d_bias.dtype)  # [n, d]
            for source, target in runs(heads):
                d_bias[target] += d_heads[source]

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

    def add_output(self, heads: Sequence[int], o: Tensor, dy: Tensor) -> None:
        """Add to the columns of ``dWo`` of ``heads``, from ``o [B, n, h, d]`` and ``dy [B, n, D]`` of some tokens."""
        d_columns = (dy.flatten(0, 1).t() @ o.flatten(0, 1).flatten(1)).unflatten(1, (-1, self.head_dim))
        d_weight = self.weight_grads["wo"].unflatten(1, (-1, self.head_dim))  # [D, H, d], a view
        for source, target in runs(heads):
            d_weight[:, target] += d_columns[:, source]

    def add_norm(self, name: str, grad: Tensor | None) -> None:
        """``grad [d]`` of ``q_norm`` or ``k_norm``, or None where the model has none."""
        if grad is not None:
            self.weight_grads[name] += grad

    def weight(self, name: str) -> Tensor | None:
        """The gradient of weight ``name`` in its dtype, which leaves, or None where the model has no such weight."""
        grad = self.weight_grads.pop(name, None)
        return None if grad is None else grad.to(getattr(self.weights, name).dtype)

    def input(self) -> Tensor:
        """``dx [B, N, D]``: one product over the query, key and value heads of all stages."""
        weights = torch.cat([getattr(self.weights, name) for name in PROJECTIONS])  # [(H + 2*G)*d, D]
        sizes = [getattr(self.weights, name).shape[0] for name in PROJECTIONS]
        dx = torch.empty_like(self.x)
        self.settle()
        slices = list(row_slices(0, self.x.shape[1], ROWS))
        grads = read_ahead((kept, rows) for rows in slices for _, _, kept in self._heads)
        for rows in slices:
            heads = self.x.new_zeros(self.x.shape[0], rows.stop - rows.start, sum(sizes))
            targets = dict(zip(PROJECTIONS, heads.split(sizes, dim=-1), strict=True))
            for name, placed, _ in self._heads:
                _put_heads(targets[name].unflatten(-1, (-1, self.head_dim)), placed, next(grads), add=name != "wq")
            dx[:, rows] = heads @ weights
        return dx


def _put_heads(target: Tensor, heads: Iterable[int], source: Tensor, add: bool = False) -> None:
    """Write ``source [B, n, h, d]`` to the heads ``heads`` of ``target [B, n, H, d]``, or add it to them."""
    for at, to in runs(tuple(heads)):
        if add:
            target[:, :, to] += source[:, :, at]
        else:
            target[:, :, to] = source[:, :, at]
