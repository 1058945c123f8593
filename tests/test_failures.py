"""A job that cannot go on ends with one sentence, and its traceback in a file."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import tempfile
from contextlib import redirect_stderr
from pathlib import Path

import pytest
import torch
from torch._utils import ExceptionWrapper

from tests.jobs import job_args, train
from tests.ranks import run_ranks
from torchtitan_upipe.job.read import read_job
from torchtitan_upipe.titan.failure import explain

LLAMA = {"model__name": "llama3_upipe", "model__flavor": "debug_kv2", "context_parallel__method": "ulysses"}


def last_words(args: list[str], memory: int = 0) -> tuple[int, str]:
    """The exit code of a job on this rank and what it printed to standard error; at most ``memory`` bytes more."""
    from torchtitan_upipe.train import main

    if memory:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory,) * 2)
    with tempfile.TemporaryFile("w+") as errors:
        with redirect_stderr(errors):
            code = main(args)
        errors.seek(0)
        return code, errors.read()


def sentence_of(folder: Path, *flags: str, ranks: int = 1, memory: int = 0, **options: object) -> str:
    """The one sentence with which rank 0 of a job ends; its traceback lies in the file that it names."""
    args = job_args(folder, ranks, *flags, **{**LLAMA, "training__steps": 3, **options})
    code, text = run_ranks(last_words, ranks, args, memory, init=False)[0]
    assert code == 1
    assert len(text.splitlines()) == 1, text
    return text.strip()


def local(path: Path, text: str) -> dict[str, object]:
    path.write_text(text)
    return {"training__dataset": "local", "training__dataset_path": path}


def rows(count: int, start: int = 0) -> str:
    return "".join(json.dumps({"text": f"document {i}: " + "words " * 60}) + "\n" for i in range(start, start + count))


ENDING = """
import atexit, sys, torch
from torchtitan_upipe.device import leave
torch._utils._get_available_device_type = lambda: sys.argv[1]
atexit.register(lambda: print("interpreter ended"))
leave(int(sys.argv[2]))
"""


@pytest.mark.parametrize("device, code, ended", [("cuda", 0, True), ("cuda", 1, False), ("cpu", 1, True)])
def test_a_failed_rank_leaves_without_its_communicators(device: str, code: int, ended: bool) -> None:
    """NCCL's would wait, at the interpreter's end, for ranks that wait for this one."""
    result = subprocess.run([sys.executable, "-c", ENDING, device, str(code)], capture_output=True, text=True)
    assert (result.returncode, "interpreter ended" in result.stdout) == (code, ended)


def test_host_memory_that_cannot_be_locked_is_out_of_memory(tmp_path: Path) -> None:
    config = read_job(job_args(tmp_path, 1, **LLAMA))
    sentence = explain(config, MemoryError("the system would not page-lock 1.00 GiB more of host memory"))
    assert sentence is not None
    assert sentence.startswith("OutOfMemoryError: the system would not page-lock 1.00 GiB")


# --- data ------------------------------------------------------------------------------------------------------------


def test_bad_data_met_in_training(tmp_path: Path) -> None:
    data = local(tmp_path / "x.jsonl", rows(9) + '{"text": 5}\n')
    line = sentence_of(tmp_path, training__steps=30, **data)
    assert line == (
        f"ValueError: {tmp_path}/x.jsonl, line 10: the column 'text' holds 5, which is no text. "
        f"(traceback: {tmp_path}/errors/rank-0.txt)"
    )
    assert "Traceback" in (tmp_path / "errors/rank-0.txt").read_text()


def test_blank_data_and_a_folder_of_another_kind_are_refused(tmp_path: Path) -> None:
    """They used to train on separators, or to go round for ever."""
    assert "holds no text: its 1 files are empty or blank" in sentence_of(tmp_path, **local(tmp_path / "x.txt", " \n"))
    stdlib = {"training__dataset": "stdlib", "training__dataset_path": tmp_path}
    assert 'holds no Python source (.py), which dataset = "stdlib" reads' in sentence_of(tmp_path, **stdlib)


def test_data_that_a_hub_does_not_give(tmp_path: Path) -> None:
    """Without a network, or with one: nobody has such a data set."""
    there = ["--validation.enable", "--validation.steps", "1", "--validation.dataset_path", "nobody/no-such-data-set"]
    line = sentence_of(tmp_path, *there)
    assert "dataset 'c4_validation' at 'nobody/no-such-data-set' cannot be opened" in line
    assert "set validation.dataset" in line


# --- going on --------------------------------------------------------------------------------------------------------

EVERY_2 = {"checkpoint__interval": 2}


def test_a_resumed_run_repeats_the_unbroken_one_after_a_pass_over_its_data(tmp_path: Path) -> None:
    """A pass has 4 steps."""
    options = {**LLAMA, **EVERY_2, **local(tmp_path / "x.jsonl", rows(8)), "training__steps": 9}
    whole = train(tmp_path / "whole", 1, "--checkpoint.enable", **options)
    shutil.copytree(
        tmp_path / "whole/checkpoint", tmp_path / "broken/checkpoint", ignore=lambda *_: ["step-8", "step-9"]
    )
    resumed = train(tmp_path / "broken", 1, "--checkpoint.enable", **options)
    assert resumed.loss == whole.loss[6:]


@pytest.mark.parametrize("before, after", [(1, 2), (2, 1)])
def test_another_number_of_data_parallel_ranks_goes_on(before: int, after: int, tmp_path: Path) -> None:
    options = {**LLAMA, "parallelism__context_parallel_degree": 1, "training__global_batch_size": 2}
    options["checkpoint__last_save_model_only"] = False
    first = train(tmp_path, before, "--checkpoint.enable", **options, training__steps=2)
    log = train(tmp_path, after, "--checkpoint.enable", **options, training__steps=4)
    assert len(first.loss) == 2
    assert len(log.loss) == 4  # steps 1 to 4, the first two from before
    assert all(loss < 9 for loss in log.loss)


def test_checkpoints_of_something_else_are_refused(tmp_path: Path) -> None:
    data = local(tmp_path / "x.jsonl", rows(8))
    last = {"checkpoint__last_save_model_only": False, "training__steps": 1}
    train(tmp_path, 1, "--checkpoint.enable", **LLAMA, **data, **{**last, "checkpoint__interval": 1})
    again = {**data, "training__steps": 3}
    (tmp_path / "y.jsonl").write_text(rows(8))
    line = sentence_of(tmp_path, "--checkpoint.enable", **{**again, "training__dataset_path": tmp_path / "y.jsonl"})
    assert f"was trained on dataset 'local' at '{tmp_path}/x.jsonl', and this job reads dataset 'local' at" in line
    assert 'To train on other data, set checkpoint.exclude_from_loading = ["dataloader"]' in line
    line = sentence_of(tmp_path, "--checkpoint.enable", **{**again, "model__flavor": "debug_heads14"})
    assert "step-1 has 'tok_embeddings.weight' as 2048 x 128, and this job's model as 2048 x 224; choose the" in line
    line = sentence_of(tmp_path, "--checkpoint.enable", **{**again, "model__flavor": "debug"})
    assert "choose the model.name and model.flavor that it was written with" in line
    options = {"checkpoint__last_save_model_only": True, "checkpoint__interval": 9}
    train(tmp_path, 1, "--checkpoint.enable", **LLAMA, **data, **options, training__steps=2)
    assert "step-2 holds a model only, as the last one" in sentence_of(tmp_path, "--checkpoint.enable", **again)
    again["checkpoint__load_step"] = 1
    metadata = tmp_path / "checkpoint/step-1/.metadata"
    metadata.write_bytes(metadata.read_bytes()[:100])
    line = sentence_of(tmp_path, "--checkpoint.enable", **again)
    assert f"checkpoint {tmp_path}/checkpoint/step-1 is damaged: .metadata has 100 bytes, of " in line
    assert "; no other checkpoint beside it is good." in line  # step-2 holds a model only


# --- memory ----------------------------------------------------------------------------------------------------------


def test_out_of_memory_on_cpu(tmp_path: Path) -> None:
    """A real one: the allocator of the CPU says so in words of its own."""
    line = sentence_of(tmp_path, memory=600 * 2**20, training__seq_len=65536)
    assert line.startswith("OutOfMemoryError: no host memory for ")
    assert "GiB more; the ledger predicts a peak of" in line
    assert "set context_parallel.tile_size = 32768" in line


def test_what_is_no_refusal_keeps_its_traceback(tmp_path: Path) -> None:
    config = read_job(job_args(tmp_path, 1, **LLAMA))
    assert explain(config, KeyError("a mistake in the program")) is None
    assert "OutOfMemoryError" in str(explain(config, torch.OutOfMemoryError("CUDA out of memory. Tried")))
    assert str(explain(config, AssertionError("a\nb"))).startswith("AssertionError: a (traceback: ")
    try:
        raise ValueError("a bad row")
    except ValueError:
        worker = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(ValueError, match="Original Traceback") as caught:
        worker.reraise()
    assert str(explain(config, caught.value)).startswith("ValueError: a bad row (traceback: ")
