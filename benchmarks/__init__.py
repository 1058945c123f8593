"""Commands that compare context-parallel methods: ``ab`` (sweep), ``report`` (beside the paper), ``rehearse`` (one rank)."""
