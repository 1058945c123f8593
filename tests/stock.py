"""TorchTitan's own ``python -m torchtitan.train``, with nothing of the plugin but CPU support before it."""

import runpy

from torchtitan_upipe.device import enable_cpu, leave

if __name__ == "__main__":
    enable_cpu()
    runpy.run_module("torchtitan.train", run_name="__main__")
    leave(0)
