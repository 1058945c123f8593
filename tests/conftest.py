"""First of all, whatever test file comes first: the device is chosen before torchtitan is imported."""

import torchtitan_upipe.train  # noqa: F401
