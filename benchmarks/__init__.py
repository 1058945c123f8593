"""Commands that compare methods: ``ab`` (a sweep), ``report`` (beside the paper), ``rehearse`` (one rank of many)."""

import torchtitan_upipe.titan.specs  # noqa: F401  (first: it chooses the device before torchtitan is imported)
