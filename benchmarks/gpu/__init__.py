"""All that one GPU must show, in one command: ``python -m benchmarks.gpu --out DIR``."""
