"""What both legs of the ledger say about one rank's memory."""

from __future__ import annotations

from dataclasses import dataclass, field

GIB = 2**30

CATEGORIES = (
    "parameters",  # this rank's shards
    "gradients",  # this rank's shards, and whole weights' gradients until they are reduced
    "optimizer",
    "communication",  # FSDP2: gathered weights, gather and reduce buffers
    "block inputs",  # hidden states between the parts of the model, and their gradients
    "attention stage",  # made and freed within a run of an attention layer
    "workspace",  # of the attention kernel's backward
    "saved",  # outlives the forward run that made it: the stash, or what autograd keeps
    "tiles",  # inner tensors of norm and feed-forward
    "loss",  # logits, loss
    "other",
)


@dataclass(frozen=True)
class Prediction:
    """Peak bytes of one rank in one training step, steady state (optimizer state exists).

    Attributes:
        device_bytes: of tensors on the device; the CUDA context, NCCL's buffers and fragmentation come on top.
        host_bytes: of tensors in host memory.
        by_category: parts of ``device_bytes``; the keys are among :data:`CATEGORIES`.
        host_by_category: parts of ``host_bytes``.
        moment: what runs at the device's peak, e.g. ``"layers.7.attention backward"``.
        moments: the most device bytes at each moment.
    """

    device_bytes: int
    host_bytes: int
    by_category: dict[str, int] = field(default_factory=dict)
    host_by_category: dict[str, int] = field(default_factory=dict)
    moment: str = ""
    moments: dict[str, int] = field(default_factory=dict)
