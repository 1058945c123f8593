"""Context parallelism for models of Transformers, without TorchTitan; see docs/huggingface.md."""

from torchtitan_upipe.huggingface.batch import shard_batch
from torchtitan_upipe.huggingface.loss import summed_loss
from torchtitan_upipe.huggingface.model import context_parallel

__all__ = ["context_parallel", "shard_batch", "summed_loss"]
