"""First of all, whatever test file comes first: which devices there are, chosen before torchtitan is imported."""

import os

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz", type=int, default=0, help="job files that test_fuzz.py draws; 0: a few, always the same")


def pytest_configure(config: pytest.Config) -> None:
    """Tests are for CPU, GPUs or not: forked ranks and float32 jobs. Those for CUDA run apart, with ``-m cuda``."""
    if config.getoption("markexpr") != "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torchtitan_upipe.train  # noqa: F401
