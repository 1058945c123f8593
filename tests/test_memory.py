"""The ledger's two legs agree, by category of the whole step and at every large moment of it."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.jobs import ROOT, job_args
from torchtitan_upipe.dry_run.dry_run import DryRun, dry_run
from torchtitan_upipe.job.read import read_job
from torchtitan_upipe.memory.__main__ import main as memory_main
from torchtitan_upipe.memory.ledger import predict
from torchtitan_upipe.memory.prediction import CATEGORIES, Prediction

pytestmark = pytest.mark.timeout(900)  # the first test waits for all dry runs
FLAVORS = {"llama3_upipe": "debug_kv2", "qwen3_upipe": "debug"}
TILES = ("--context_parallel.tile_size", "1024")  # four a rank
LARGE_TILES = ("--context_parallel.tile_size", "8192")  # of long sequences: a dry run takes a time for each tile
LAYOUTS = [("upipe", 1), ("ulysses", 1), ("ring", 1), ("upipe", 2), ("ulysses", 2), ("fpdt", 1)]  # method, ring degree


@dataclass(frozen=True)
class Case:
    """One job of the matrix."""

    model: str
    method: str
    ring_degree: int
    degree: int
    checkpoint: str
    extra: tuple[str, ...] = ()

    @property
    def args(self) -> tuple[str, ...]:
        options = {
            "job.config_file": ROOT / "train_configs/llama3_debug.toml",
            "model.name": self.model,
            "model.flavor": FLAVORS[self.model],
            "model.hf_assets_path": ROOT / "torchtitan_upipe/assets/tokenizer",
            "training.seq_len": 4096 * self.degree,
            "parallelism.context_parallel_degree": self.degree,
            "context_parallel.method": self.method,
            "context_parallel.ring_degree": self.ring_degree,
            "context_parallel.head_chunk": 4 if self.method == "upipe" else 0,
            "context_parallel.sequence_chunk": 1024 * self.degree if self.method == "fpdt" else 65536,
            "activation_checkpoint.mode": self.checkpoint,
        }
        return tuple(word for name, value in options.items() for word in (f"--{name}", str(value))) + self.extra

    def __str__(self) -> str:
        extra = " ".join(word.rpartition(".")[2] for word in self.extra)
        return f"{self.model}-{self.method}-{self.degree}x{self.ring_degree}-{self.checkpoint}-{extra}"


def cases() -> Iterator[Case]:
    for method, ring in LAYOUTS:
        yield Case("llama3_upipe", method, ring, 8, "full" if ring > 1 else "none")
        yield Case("qwen3_upipe", method, ring, 8, "none" if ring > 1 else "full")
        if ring == 1:
            yield Case("qwen3_upipe" if method == "ring" else "llama3_upipe", method, ring, 2, "full")
    tiles, host = TILES, ("--context_parallel.stash", "host")
    llama, qwen = FLAVORS
    yield Case(llama, "ulysses", 1, 8, "none", tiles)
    yield Case(qwen, "ulysses", 1, 8, "full", (*tiles, "--activation_checkpoint.offload"))
    yield Case(llama, "upipe", 1, 8, "none", (*tiles, "--context_parallel.stash", "none"))
    for model in FLAVORS:
        yield Case(model, "upipe", 1, 8, "full", (*tiles, *host, "--activation_checkpoint.offload"))
    yield Case(qwen, "fpdt", 1, 8, "full", (*tiles, *host, "--activation_checkpoint.offload"))
    yield Case(llama, "upipe", 1, 2, "full", (*tiles, *host, "--training.enable_cpu_offload"))
    yield Case("llama3_upipe", "upipe", 1, 2, "full", (*tiles, *host, "--context_parallel.query_tiles", "4"))
    deterministic = ("--debug.deterministic", "--training.seq_len", "131072")  # more than a call's least rows
    yield Case("llama3_upipe", "upipe", 1, 2, "full", (*LARGE_TILES, *deterministic))
    yield Case("llama3_upipe", "fpdt", 1, 8, "none", (*tiles, "--context_parallel.stash", "none"))
    for chunk in (3000, 65536):  # a shorter last one; a single one
        yield Case(
            "llama3_upipe", "fpdt", 1, 2, "full", (*tiles, *host, "--context_parallel.sequence_chunk", str(chunk))
        )


def hidden_cases() -> Iterator[Case]:
    """Hidden states on the host, of all methods that have a stage loop."""
    shared = ("--context_parallel.tile_size", "512", "--context_parallel.hidden_states", "host")
    hidden = (*shared, "--context_parallel.stash", "host")
    for model in FLAVORS:
        yield Case(model, "upipe", 1, 8, "full", hidden)
        yield Case(model, "ulysses", 1, 2, "full", hidden)
    yield Case("llama3_upipe", "ring", 1, 2, "full", hidden)
    yield Case("llama3_upipe", "upipe", 1, 2, "full", (*shared, "--context_parallel.stash", "none"))
    yield Case("llama3_upipe", "upipe", 1, 1, "full", (*hidden, "--training.enable_cpu_offload"))


def one_rank_cases() -> Iterator[Case]:
    """State on the host: FSDP2 on a mesh of one. Some lengths are more than one slice of rows (``cp/rope.py``)."""
    state, inputs = ("--training.enable_cpu_offload",), ("--activation_checkpoint.offload",)
    tiles, host = TILES, ("--context_parallel.stash", "host")
    llama, qwen = FLAVORS
    for model in FLAVORS:
        for length in (tiles, (*LARGE_TILES, "--training.seq_len", "40960")):
            yield Case(model, "upipe", 1, 1, "full", (*state, *inputs, *host, *length))
    yield Case(qwen, "upipe", 1, 1, "full", (*state, *inputs, *host))
    yield Case(llama, "ulysses", 1, 1, "full", (*state, *inputs, *tiles))
    yield Case(qwen, "upipe", 1, 1, "none", (*state, *tiles))
    yield Case(llama, "ulysses", 1, 1, "none", state)


ONE_RANK = list(one_rank_cases())
HIDDEN = list(hidden_cases())
CASES = [*cases(), *ONE_RANK, *HIDDEN]


@pytest.fixture(scope="module")
def dry_runs() -> dict[Case, Prediction]:
    """Of all cases, by one child process."""
    return dict(zip(CASES, dry_run([DryRun(case.args, case.degree) for case in CASES]), strict=True))


def ledger(case: Case, workspace: bool = True) -> Prediction:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "WORLD_SIZE", str(case.degree))
        return predict(read_job(case.args), case.degree, workspace=workspace)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_legs_agree(case: Case, dry_runs: dict[Case, Prediction]) -> None:
    predicted, simulated = ledger(case), dry_runs[case]
    assert sum(predicted.by_category.values()) == predicted.device_bytes
    assert set(predicted.by_category) | set(simulated.by_category) <= set(CATEGORIES)
    assert predicted.device_bytes == pytest.approx(simulated.device_bytes, rel=0.05)
    assert predicted.host_bytes == pytest.approx(simulated.host_bytes, rel=0.05, abs=2**18)  # tokens and labels
    for moment, bytes_ in simulated.moments.items():
        if case in HIDDEN and not moment.startswith("layers."):
            continue  # the dry run names moments of the loss by modules that only pass handles on
        if moment in predicted.moments and bytes_ > simulated.device_bytes / 2:
            assert predicted.moments[moment] == pytest.approx(bytes_, rel=0.08), moment


def test_a_tile_of_the_loss_holds_two_float32_copies_of_its_logits(dry_runs: dict[Case, Prediction]) -> None:
    """A third one, in bfloat16, would be 1.6 % of the smallest of these."""
    for case in CASES:
        if "--context_parallel.tile_size" in case.extra and case.degree > 1:
            simulated = dry_runs[case].moments["output forward"]
            assert ledger(case).moments["output forward"] == pytest.approx(simulated, rel=0.01), case


@pytest.mark.parametrize("case", ONE_RANK, ids=str)
def test_one_rank_holds_its_state_on_the_host(case: Case, dry_runs: dict[Case, Prediction]) -> None:
    """Closer than others, both legs; no weight, gradient or moment stays on the device."""
    predicted, simulated = ledger(case), dry_runs[case]
    assert predicted.device_bytes == pytest.approx(simulated.device_bytes, rel=0.03)
    assert predicted.host_bytes == pytest.approx(simulated.host_bytes, rel=0.001)
    for leg in (predicted, simulated):
        assert not leg.by_category.get("parameters")
        assert not leg.by_category.get("optimizer")
        assert leg.host_by_category["optimizer"] == pytest.approx(2 * leg.host_by_category["parameters"], rel=0.001)


@pytest.mark.parametrize("case", HIDDEN, ids=str)
def test_hidden_states_leave_the_device(case: Case, dry_runs: dict[Case, Prediction]) -> None:
    """Both legs within 3%, and far below the same job with its hidden states on the device."""
    predicted, simulated = ledger(case), dry_runs[case]
    assert predicted.device_bytes == pytest.approx(simulated.device_bytes, rel=0.03)
    on_device = replace(case, extra=tuple("device" if word == "host" else word for word in case.extra))
    assert predicted.device_bytes < ledger(on_device).device_bytes


def test_every_switch_changes_the_prediction() -> None:
    """More knobs, less memory; and what leaves the device stands on the host."""
    knobs = (
        # four layers, so that offload shows, and shards of more than one slice of rows (cp/gradients.py)
        ("--model.flavor", "debug", "--context_parallel.head_chunk", "8", "--training.seq_len", "65536"),
        ("--context_parallel.tile_size", "512"),
        ("--context_parallel.stash", "host"),
        ("--activation_checkpoint.offload",),
        ("--context_parallel.query_tiles", "4"),
        ("--context_parallel.head_chunk", "2"),
    )
    steps = list(itertools.accumulate(knobs))
    found = [ledger(Case("llama3_upipe", "upipe", 1, 2, "full", extra)) for extra in steps]
    attention = "layers.3.attention backward"
    for less, more in itertools.pairwise(reversed(found)):
        assert less.device_bytes <= more.device_bytes
        assert less.moments[attention] <= more.moments[attention]
        assert less.device_bytes < more.device_bytes or less.moments[attention] < more.moments[attention]
    assert found[-1].host_bytes > found[0].host_bytes
    all_heads = Case("llama3_upipe", "ulysses", 1, 8, "full", ("--context_parallel.tile_size", "512"))
    assert ledger(all_heads, workspace=False).device_bytes < ledger(all_heads).device_bytes


def test_the_table_shows_both_legs(capsys: pytest.CaptureFixture[str]) -> None:
    case = CASES[0]
    assert memory_main([*case.args, "--dry-run"]) == 0
    table = capsys.readouterr().out
    assert f"{ledger(case).device_bytes / 2**30:.3f}" in table
    assert "difference" in table
    assert "Peak of the dry run: loss backward" in table
    assert memory_main([*case.args, "--context_parallel.head_chunk", "99"]) == 1
    assert "head_chunk = 99" in capsys.readouterr().err


def test_a_dry_run_without_fsdp_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a dry run is for jobs whose weights FSDP2 holds: .* without --dry-run"):
        dry_run([DryRun(tuple(job_args(tmp_path, 1, context_parallel__head_chunk=4)), 1)])
