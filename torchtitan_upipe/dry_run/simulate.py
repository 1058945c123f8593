"""Child process of ``dry_run.py``: the real trainer on fake tensors, fake ranks and a device that does not exist.

``python -m torchtitan_upipe.dry_run.simulate`` reads jobs from standard input, one JSON object a line, and writes one
line of JSON for each to the file named on its command line. The device is chosen once per process, before TorchTitan is
imported, which is why this is not a function.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torchtitan_upipe.device import SIMULATED, enable_simulated_device

enable_simulated_device()  # before any torchtitan import: see device.py

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.distributed._tools.fake_collectives  # noqa: E402  (collectives on fake tensors)
from torch import Tensor  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily  # noqa: E402
from torch.distributed.checkpoint.state_dict import _init_optim_state  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from torch.distributed.tensor._sharding_prop import ShardingPropagator  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402
from torch.utils._python_dispatch import _disable_current_modes  # noqa: E402
from torch.utils._pytree import tree_iter  # noqa: E402
from torchtitan.config import JobConfig  # noqa: E402
from torchtitan.distributed import ParallelDims  # noqa: E402
from torchtitan.protocols.train_spec import get_train_spec  # noqa: E402

from torchtitan_upipe.dry_run.live_bytes import LiveBytes  # noqa: E402
from torchtitan_upipe.dry_run.moments import Moments  # noqa: E402
from torchtitan_upipe.job.model import model_args  # noqa: E402
from torchtitan_upipe.job.pretrained import PretrainedArgs  # noqa: E402
from torchtitan_upipe.job.read import read_job  # noqa: E402
from torchtitan_upipe.job.shape import job_shape  # noqa: E402
from torchtitan_upipe.memory.prediction import Prediction  # noqa: E402
from torchtitan_upipe.titan.attention import ContextParallelAttention  # noqa: E402
from torchtitan_upipe.titan.trainer import Trainer  # noqa: E402

PACKAGE = Path(__file__).parent.parent
FUSED = (torch.ops.aten._fused_adam_.default, torch.ops.aten._fused_adamw_.default)
WIDER_PRODUCT = torch.ops.aten.addmm.dtype_out  # a sum of narrow products into a wide tensor (tiled/tiles.py)


class Meter(LiveBytes):
    """Also answers what fake tensors cannot: a number read back is 1, a condition is false (no loop goes on for it).

    A fused optimizer step works in place; its fake stand-in would copy all its arguments. So does a product added to a
    wider tensor; that of torch 2.11 takes the dtype for a factor and fails. Tensors made before fake ones took over
    (those of device meshes) stay real.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and count the storages of what it returns."""
        if func is torch.ops.aten._local_scalar_dense.default:
            dtype = args[0].dtype
            return False if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
        if func in FUSED and not any(issubclass(kind, DTensor) for kind in types):
            return None
        if func is WIDER_PRODUCT:
            return kwargs["out"]
        tensors = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
        real = func is not torch.ops.aten.lift_fresh.default  # which is how a new constant becomes fake
        if real and tensors and not any(isinstance(tensor, (FakeTensor, DTensor)) for tensor in tensors):
            with unset_fake_temporarily():
                return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


class FusedRMSNorm(torch.autograd.Function):
    """What ``aten::_fused_rms_norm`` allocates, CUDA's operator; other devices have a composite one that keeps more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """Normalised ``x``, with its scale kept."""
        scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.promote_types(x.dtype, torch.float32))
        ctx.save_for_backward(x, weight, scale)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        """Gradients of ``x`` and ``weight``."""
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


class DryTrainer(Trainer):
    """The trainer of ``train.py`` without data and log, and with a mesh made of real tensors."""

    def init_distributed(self) -> ParallelDims:
        """As TorchTitan does; meshes read their tensors back, so they are made before fake tensors take over."""
        with unset_fake_temporarily():
            dims = super().init_distributed()
            dims.build_mesh()
        return dims

    def batches(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Any tokens."""
        training = self.job_config.training
        while True:
            tokens = torch.zeros(training.local_batch_size, training.seq_len + 1, dtype=torch.int64)
            yield {"input": tokens[:, :-1]}, tokens[:, 1:]


@contextmanager
def fake_ranks(rank: int, world_size: int) -> Iterator[None]:
    """A process group of ``world_size`` ranks of which only this one exists."""
    os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(world_size))
    dist.init_process_group(f"cpu:fake,{SIMULATED}:fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def unwatched(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` out of sight: DTensor infers shapes with whole tensors that are fake in real runs, too."""

    def call(*args: Any) -> Any:
        with _disable_current_modes():
            return function(*args)

    return call


def stand_in_for_device() -> torch.library.Library:
    """Replace, in this process, what would behave otherwise on a real device.

    Returns:
        Operators of the simulated device, there as long as this is held.
    """
    torch.rms_norm = lambda x, shape, weight, eps=None: FusedRMSNorm.apply(x, weight)  # type: ignore[assignment, misc]
    infer_shapes = ShardingPropagator._propagate_tensor_meta_non_cached
    ShardingPropagator._propagate_tensor_meta_non_cached = unwatched(infer_shapes)  # type: ignore[method-assign]
    operators = torch.library.Library("aten", "IMPL")
    operators.impl("silu_backward", lambda grad, x: torch.empty_like(x), "PrivateUse1")  # else a composite of four
    return operators


def leave_out_what_holds_nothing(config: JobConfig) -> None:
    """Cut from a job what costs time, files or random numbers and no memory in a training step."""
    config.debug.seed = config.debug.seed or 0  # a seed drawn at random would be read back
    config.activation_checkpoint.preserve_rng_state = False  # no random numbers on the simulated device
    tokenizer = str(PACKAGE / "assets/tokenizer")
    args = model_args(config)
    if isinstance(args, PretrainedArgs):  # keep the shape, which is read from where the tokenizer is
        flavors: Any = get_train_spec(config.model.name).model_args
        flavors[config.model.flavor] = args = copy.copy(args)
        args.assets = tokenizer
    config.model.hf_assets_path = tokenizer
    config.training.dataset, config.training.dataset_path = "stdlib", str(PACKAGE / "memory")
    config.training.document_mask = False  # one document needs the most
    config.validation.enable = config.checkpoint.enable = config.profiling.enable_profiling = False
    config.evaluation.enable = False
    config.metrics.enable_tensorboard = config.metrics.enable_wandb = False
    config.metrics.log_freq = 3  # the step taken is 2


def simulate_job(config: JobConfig, workspace: bool) -> Prediction:
    """Run ``config``'s training step on this fake rank; ``workspace`` as in ``DryRun``.

    Raises:
        ValueError: no FSDP2, without which TorchTitan swaps weights, which fake tensors do not bear.
    """
    if not job_shape(config).fsdp:
        raise ValueError(
            "a dry run is for jobs whose weights FSDP2 holds: more than one rank that are not all replicas, or "
            "training.enable_cpu_offload = true; the ledger answers without --dry-run."
        )
    leave_out_what_holds_nothing(config)
    moments = Moments()
    torch.use_deterministic_algorithms(False)  # of the job before, maybe
    with FakeTensorMode(), Meter(moments) as meter:
        trainer = DryTrainer(config)
        (model,) = trainer.model_parts
        for module in model.modules():
            if isinstance(module, ContextParallelAttention):
                module.method.attention.kernel.workspace = workspace  # type: ignore[attr-defined]
        for optimizer in trainer.optimizers:
            _init_optim_state(optimizer)
        meter.restart()
        trainer.step = 2  # the first one is logged
        with moments.watching(model, meter):
            trainer.train_step(trainer.batch_generator(trainer.batches()))
        trainer.close()
    device, host = meter.usage[SIMULATED], meter.usage["cpu"]
    return Prediction(device.peak, host.peak, device.at_peak, host.at_peak, device.moment, device.moments)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The prediction that ``request`` (a ``DryRun`` as a dictionary) asks for, or the sentence that refuses the job."""
    with fake_ranks(request["rank"], request["world_size"]):
        try:
            return dataclasses.asdict(
                simulate_job(read_job(request["args"], request["world_size"]), request["workspace"])
            )
        except ValueError as error:
            return {"error": str(error)}


def main() -> None:
    """Simulate what standard input asks for."""
    operators = stand_in_for_device()  # noqa: F841  (held)
    logging.disable(logging.INFO)
    with Path(sys.argv[1]).open("w") as answers:
        for line in sys.stdin:
            print(json.dumps(answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
