"""Commands that compare methods: ``ab`` (a sweep), ``report`` (beside the paper), ``rehearse`` (one rank of many)."""

import torchtitan_upipe.train  # noqa: F401  (first: chooses the device before torchtitan is imported, knows the models)
