"""New behaviour for a module that stays where it is, with its parameters, names, hooks and sharding."""

from __future__ import annotations

from functools import cache
from typing import Any, TypeVar, cast

from torch import nn

Behaviour = TypeVar("Behaviour", bound=nn.Module)


def adopt(module: nn.Module, behaviour: type[Behaviour], **attributes: Any) -> Behaviour:
    """Give ``module`` the methods of ``behaviour`` before its own, and ``attributes``; returns ``module``.

    Its class becomes a subclass of both under the old name, the same one for all modules of a class, since Accelerate
    finds blocks to shard by name and class. It works before and after FSDP2, which changes classes, too.
    """
    module.__class__ = _joined(type(module), behaviour)  # type: ignore[arg-type]  # classes are hashable
    for name, value in attributes.items():
        setattr(module, name, value)
    return cast(Behaviour, module)


@cache
def _joined(original: type[nn.Module], behaviour: type[nn.Module]) -> type[nn.Module]:
    return type(original.__name__, (behaviour, original), {"__module__": original.__module__})
