"""Job files drawn at random: each ends in one sentence, or trains two steps to the loss of one rank.

``pytest tests/test_fuzz.py --fuzz 1000 --hypothesis-seed 1`` draws that many; the suite draws a few, always the same.
"""

from __future__ import annotations

import collections
import json
import math
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.job_ranks import JobRanks
from tests.jobs import BASE, Log, read_log, seed_checkpoint
from torchtitan_upipe.job.read import read_job

Job = dict[str, Any]  # "section.field" -> value

NUMBERS = [0, -1, 0.5, math.nan, math.inf, "1", True]  # of wrong types and ranges
METHODS = {
    "context_parallel.method": ["upipe", "ulysses", "ring", "fpdt", "torchtitan", "cp"],
    "context_parallel.settings": ["manual", "auto"],
    "context_parallel.head_chunk": [0, 1, 2, 3, 4, 8, 9, -1, "all"],
    "context_parallel.ring_degree": [1, 2, 3, 0],
    "context_parallel.sequence_chunk": [1, 2, 16, 33, 65536, 0, -4],
    "context_parallel.attention_kernel": ["auto", "sdpa", "reference", "cudnn", "flash2", "flash"],
    "context_parallel.query_tiles": [1, 2, 7, 1000, 0],
    "context_parallel.stash": ["none", "device", "host", "disk"],
    "context_parallel.stash_budget_gib": [0.0, 1e-6, 1.0, -1.0, math.nan],
    "context_parallel.tile_size": [0, 1, 7, 16, 32768, -3],
    "context_parallel.hidden_states": ["device", "host"],
    "activation_checkpoint.mode": ["none", "full", "selective", "memory_budget", "all"],
    "activation_checkpoint.selective_ac_option": ["op", "1", "2", "0", "x"],
    "activation_checkpoint.offload": [True, False],
    "activation_checkpoint.preserve_rng_state": [True, False],
    "activation_checkpoint.early_stop": [True, False],
}
DATA = {
    "training.seq_len": [1, 2, 3, 31, 32, 64, 10**13, *NUMBERS],
    "training.local_batch_size": [1, 2, *NUMBERS],
    "training.global_batch_size": [-1, 1, 2, 3, 4, 0],
    "training.document_mask": [True, False],
    "training.packing": ["join", "first_fit", "best_fit"],
    "training.labels_across_documents": [True, False],
    "training.longer_conversations": ["drop", "cut"],
    "training.dataset": ["stdlib", "local", "chat", "mixture", "c4_test", "c5"],
    "training.dataset_path": ["texts.jsonl", "chat.jsonl", "mixture.toml", "empty.txt", "broken.jsonl", "nowhere"],
    "training.dataloader.num_workers": [0, 2, -1],
    "training.dataloader.pin_memory": [False, True],
    "validation.enable": [True],
    "validation.dataset": ["stdlib", "c4_validation", "local", "mixture"],
    "validation.steps": [1, 0, -1, -2],
    "validation.freq": [1, 2, 0],
    "validation.seq_len": [32, 31, 0],
    "model.hf_assets_path": ["nowhere", "."],
}
MODEL = {
    "model.name": ["llama3_upipe", "qwen3_upipe", "llama3", "gpt"],
    "model.flavor": ["debug", "debug_kv2", "debug_heads14", "debug_tied", "debugmodel", "debugmodel_moe", "hf", "9B"],
    "model.rope_theta": [1e4, 5e5, *NUMBERS],
    "model.rope_scaling.type": ["none", "linear", "llama3", "yarn", "dynamic"],
    "model.rope_scaling.factor": [2.0, 4.0, *NUMBERS],
    "model.rope_scaling.original_max_position_embeddings": [16, 8192, 0, -1],
    "model.rope_scaling.beta_fast": [32.0, 1.0, 0.0],
    "model.converters": [["float8"], []],
    "optimizer.name": ["Adam", "AdamW", "SGD"],
    "optimizer.implementation": ["for-loop", "foreach", "fused", "slow"],
    "optimizer.lr": [1e-3, 0.0, *NUMBERS],
    "optimizer.beta1": [0.9, *NUMBERS],
    "optimizer.early_step_in_backward": [True],
    "lr_scheduler.warmup_steps": [0, 1, 5, *NUMBERS],
    "lr_scheduler.total_steps": [1, 2, 9, *NUMBERS],
    "lr_scheduler.decay_ratio": [0.5, 2.0, *NUMBERS],
    "lr_scheduler.decay_type": ["linear", "cosine", "sqrt", "steps"],
    "lr_scheduler.min_lr_factor": [0.1, *NUMBERS],
    "training.max_norm": [0.1, *NUMBERS],
    "training.mixed_precision_param": ["float32", "bfloat16", "float16"],
    "training.mixed_precision_reduce": ["float32", "bfloat16"],
    "training.dtype": ["float32", "bfloat16", "float64"],
    "training.enable_cpu_offload": [True, False],
    "training.gc_freq": [1, 50, 0],
    "training.gc_debug": [True],
}
RUN = {
    "parallelism.context_parallel_degree": [1, 2, 3, *NUMBERS],
    "parallelism.data_parallel_shard_degree": [-1, 1, 2, 0],
    "parallelism.data_parallel_replicate_degree": [1, 2, *NUMBERS],
    "parallelism.tensor_parallel_degree": [1, 2, 0],
    "parallelism.pipeline_parallel_degree": [1, 2, 0],
    "parallelism.expert_parallel_degree": [1, 2],
    "parallelism.fsdp_reshard_after_forward": ["always", "never", "default", "sometimes"],
    "parallelism.context_parallel_load_balancer": ["headtail", "ptrr", "other"],
    "parallelism.disable_loss_parallel": [True, False],
    "checkpoint.interval": [1, 5, *NUMBERS],
    "checkpoint.keep_latest_k": [0, 1, 2, -1],
    "checkpoint.load_step": [-1, 0, 7, -2],
    "checkpoint.async_mode": ["disabled", "async", "async_with_pinned_mem", "later"],
    "checkpoint.last_save_in_hf": [True, False],
    "checkpoint.last_save_model_only": [True, False],
    "checkpoint.initial_load_in_hf": [True],
    "checkpoint.initial_load_path": ["nowhere"],
    "checkpoint.exclude_from_loading": [["optimizer"], ["nothing"]],
    "checkpoint.export_dtype": ["float32", "bfloat16", "int8"],
    "checkpoint.folder": ["other", "/proc/x"],
    "checkpoint.create_seed_checkpoint": [True],
    "checkpoint.load_only": [False],
    "comm.mode": ["default", "local_tensor", "fake"],
    "comm.init_timeout_seconds": [60, 0],
    "comm.train_timeout_seconds": [60, *NUMBERS],
    "compile.enable": [True],
    "debug.seed": [1, 0, -1, "a"],
    "debug.deterministic": [True],
    "metrics.log_freq": [2, 0],
    "metrics.disable_color_printing": [True],
    "profiling.enable_profiling": [True],
    "profiling.enable_memory_snapshot": [True],
    "fault_tolerance.enable": [True],
    "experimental.custom_import": ["no.such.module", "torchtitan_upipe.train_spec"],
    "job.custom_config_module": ["torchtitan_upipe.job_config", "torchtitan.config.job_config"],
    "job.print_config": [True],
    "nonsense.field": [1],
    "training.seqlen": [64],
}
FIELDS = METHODS | DATA | MODEL | RUN
OWN = ("context_parallel.", "activation_checkpoint.", "parallelism.", "training.enable_cpu_offload", "comm.")


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    """A few fields, rather of one theme, and often what the method asks for."""
    themes = draw(st.lists(st.sampled_from([METHODS, METHODS, DATA, MODEL, RUN]), min_size=1, max_size=4))
    job: Job = {}
    for theme in themes:
        name = draw(st.sampled_from(sorted(theme)))
        job[name] = draw(st.sampled_from(theme[name]))
    return job


def toml(job: Job, folder: Path) -> Path:
    """The debug job with these fields, as a file."""
    values = tomllib.loads(Path(BASE["job.config_file"]).read_text())
    for name, value in ({k: v for k, v in BASE.items() if k != "job.config_file"} | job).items():
        *sections, last = name.split(".")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    lines: list[str] = []

    def write(section: str, fields: dict[str, Any]) -> None:
        lines.append(f"[{section}]")
        inner = {k: v for k, v in fields.items() if isinstance(v, dict)}
        lines.extend(f"{k} = {literal(v)}" for k, v in fields.items() if k not in inner)
        for name, more in inner.items():
            write(f"{section}.{name}", more)

    for section, fields in values.items():
        write(section, fields)
    path = folder / "job.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def literal(value: object) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return json.dumps(str(value) if isinstance(value, Path) else value)


def last_words(args: list[str]) -> tuple[int, str]:
    """Exit code and standard error of a job."""
    from torchtitan_upipe.train import main

    with tempfile.TemporaryFile("w+") as errors:
        with redirect_stderr(errors):
            code = main(args)
        errors.seek(0)
        return code, errors.read()


@dataclass
class Bench:
    """What cases share: ranks that are started, one-rank references, seeds."""

    folder: Path
    ranks: JobRanks
    one: JobRanks
    seeds: dict[str, Path] = field(default_factory=dict)
    references: dict[str, Log] = field(default_factory=dict)
    count: int = 0
    ends: collections.Counter[str] = field(default_factory=collections.Counter)

    def file(self, job: Job) -> list[str]:
        folder = self.folder / str(self.count)
        folder.mkdir()
        self.count += 1
        paths = {n: str(self.folder / v) for n, v in job.items() if n.endswith("dataset_path")}
        fixed = {"job.dump_folder": str(folder), "training.steps": 2, "training.seq_len": 32, "checkpoint.folder": "c"}
        fixed |= {"validation.seq_len": 32, "validation.steps": 1, "validation.local_batch_size": 1}
        fixed |= {"parallelism.context_parallel_degree": 2, "parallelism.data_parallel_shard_degree": -1}
        return ["--job.config_file", str(toml(fixed | job | paths, folder))]

    def start(self, job: Job) -> Job:
        """From weights that do not depend on sharding, with nothing saved, unless the case is about that."""
        names = {k: v for k, v in job.items() if k.startswith("model.") and k.endswith(("name", "flavor"))}
        key = json.dumps(names, sort_keys=True)
        if key not in self.seeds:
            options = {name.replace(".", "__"): value for name, value in names.items()}
            self.seeds[key] = seed_checkpoint(self.folder / f"seed{len(self.seeds)}", **options)
        return {
            "checkpoint.enable": True,
            "checkpoint.load_only": True,
            "checkpoint.initial_load_path": str(self.seeds[key]),
        } | job

    def reference(self, job: Job) -> Log:
        plain = {k: v for k, v in job.items() if not k.startswith(OWN)}
        plain |= {"context_parallel.method": "ulysses", "parallelism.context_parallel_degree": 1}
        key = json.dumps(plain, sort_keys=True)
        if key not in self.references:
            args = self.file(self.start(plain))
            code, text = self.one(last_words, args)[0]
            assert code == 0, f"one rank does not do what two do: {text}"
            self.references[key] = read_log(Path(args[1]).parent)
        return self.references[key]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("fuzz")
    rows = [json.dumps({"text": f"document {i}: " + "words " * (i % 40)}) for i in range(60)]
    (folder / "texts.jsonl").write_text("\n".join(rows))
    (folder / "broken.jsonl").write_text("\n".join([*rows[:2], '{"text": 5}', '{"te']))
    (folder / "empty.txt").write_text(" \n")
    talk = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "because"}]
    (folder / "chat.jsonl").write_text("\n".join([json.dumps({"messages": talk})] * 40))
    source = f'[[source]]\ndataset = "local"\ndataset_path = "{folder}/texts.jsonl"\nweight = 1.0\n'
    (folder / "mixture.toml").write_text(source)
    with JobRanks(2) as ranks, JobRanks(1) as one:
        bench = Bench(folder, ranks, one)
        yield bench
        print(f"cases: {sum(bench.ends.values())}; {dict(bench.ends)}")


def is_sentence(text: str) -> bool:
    kinds = ("ValueError: ", "AssertionError: ", "OSError: ", "OutOfMemoryError: ", "FileNotFoundError: ")
    return len(text.strip().splitlines()) == 1 and text.startswith(kinds) and "Traceback (" not in text


def refusal(args: list[str]) -> str | None:
    """With what the job is refused before anything starts; None where it is not."""
    try:
        read_job(args, 2)
    except ValueError as error:
        return f"ValueError: {error}"
    return None


def run_case(bench: Bench, job: Job) -> str:
    """How the case ends, in a word; fails where it ends otherwise than in a sentence or in the loss of one rank."""
    sentence = refusal(bench.file(job))
    if sentence is None:
        job = bench.start(job)
        args = bench.file(job)
        sentence = refusal(args)
    if sentence is not None:
        assert is_sentence(sentence), sentence
        return "refused"
    (code, text), *_ = bench.ranks(last_words, args)
    if code != 0:
        assert is_sentence(text), text
        print("ENDED", job, text)
        return "ended"
    log = read_log(Path(args[1]).parent)
    assert all(math.isfinite(number) for number in log.loss + log.grad_norm)
    if job.get("parallelism.context_parallel_degree", 2) != 2 or not log.loss:
        return "trained on other batches"
    whole = bench.reference(job)
    tolerance = 3e-2 if "bfloat16" in map(str, job.values()) else 1e-4
    assert log.loss == pytest.approx(whole.loss, rel=tolerance)
    assert log.grad_norm == pytest.approx(whole.grad_norm, rel=10 * tolerance)
    return "trained"


def test_job_files(bench: Bench, request: pytest.FixtureRequest) -> None:
    by_hand = request.config.getoption("--fuzz")

    @settings(
        max_examples=by_hand or 10,
        derandomize=not by_hand,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(job=jobs())
    def case(job: Job) -> None:
        try:
            bench.ends[run_case(bench, job)] += 1
        except Exception as error:
            if not by_hand:
                raise
            bench.ends["failed"] += 1
            print("FAILED", job, type(error).__name__, str(error)[-1500:], flush=True)
        if by_hand and sum(bench.ends.values()) % 20 == 0:
            print("cases:", sum(bench.ends.values()), dict(bench.ends), flush=True)

    case()
    assert bench.ends["failed"] == 0
