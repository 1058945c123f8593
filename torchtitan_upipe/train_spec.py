"""The models ``llama3_upipe`` and ``qwen3_upipe``; name this module in ``[experimental] custom_import``.

Importing it registers them with TorchTitan, together with the project's datasets: that is how TorchTitan's
``custom_import`` finds plugins.
"""

from __future__ import annotations

from torchtitan_upipe.titan.specs import llama3_spec, qwen3_spec

__all__ = ["llama3_spec", "qwen3_spec"]
