"""Commands that compare methods: ``ab`` (a sweep), ``report`` (beside the paper), ``rehearse`` (one rank of many)."""
