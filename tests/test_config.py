"""Bad input gets one clear sentence before anything is allocated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.jobs import ROOT, job_args
from torchtitan_upipe.job.check import validate_job
from torchtitan_upipe.job.load import load_config
from torchtitan_upipe.job.read import read_job
from torchtitan_upipe.titan.specs import SPECS

QWEN = {"model__name": "qwen3_upipe"}


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"training__seq_len": 2}, r"training.seq_len = 2 leaves some of the 4 context-parallel ranks without a token"),
        (
            {"training__seq_len": 252, "context_parallel__method": "torchtitan"},
            r"seq_len = 252 must be a multiple of 8 \(twice context_parallel_degree\) .* nearest: 248 or 256",
        ),
        (
            {"context_parallel__method": "torchtitan"},
            r"method = \"torchtitan\" works on CUDA only and this job runs on",
        ),
        (
            {"context_parallel__method": "torchtitan", "context_parallel__ring_degree": 2},
            r"ring_degree = 2 has no meaning for method = \"torchtitan\"",
        ),
        (
            {"context_parallel__method": "torchtitan", "training__document_mask": True},
            r"document_mask with TorchTitan's own context parallelism does not work",
        ),
        (
            {"context_parallel__method": "ring", "parallelism__context_parallel_load_balancer": "ptrr"},
            r"'ptrr' permutes the sequence, but method = 'ring' with ring_degree = 1 shards it",
        ),
        (
            {"context_parallel__method": "ring", "context_parallel__head_chunk": 4},
            r"head_chunk = 4 has no meaning for method = \"ring\"",
        ),
        ({"context_parallel__tile_size": -1}, r"tile_size = -1 must be a number of rows, or 0 for no tiling"),
        ({"training__steps": 0}, r"training.steps = 0 must be at least 1"),
        ({"training__max_norm": 0}, r"training.max_norm = 0 must be positive; inf leaves gradients unclipped"),
        ({"training__max_norm": -1}, r"training.max_norm = -1 must be positive"),
        ({"training__seq_len": 10**13}, r"training.seq_len = 10000000000000 must be at most 2147483647"),
        ({"training__dataloader__num_workers": 2}, r"num_workers = 2 would serve each batch 2 times; set it to 1"),
        ({"optimizer__lr": "-1e-3"}, r"optimizer.lr = -0.001 must be a finite number of at least 0"),
        ({"optimizer__lr": "nan"}, r"optimizer.lr = nan must be a finite number"),
        ({"optimizer__name": "Adamw"}, r"optimizer.name = 'Adamw' is unknown; choose 'Adam' or 'AdamW'"),
        ({"optimizer__beta2": 1}, r"optimizer.beta2 = 1 must be at least 0 and below 1"),
        ({"lr_scheduler__warmup_steps": -1}, r"lr_scheduler.warmup_steps = -1 must be at least 0"),
        ({"lr_scheduler__decay_ratio": 2}, r"lr_scheduler.decay_ratio = 2 must be between 0 and 1"),
        ({"parallelism__tensor_parallel_degree": 0}, r"tensor_parallel_degree = 0 must be at least 1"),
        (
            {"parallelism__data_parallel_replicate_degree": -1},
            r"data_parallel_replicate_degree = -1 must be at least 1",
        ),
        ({"comm__train_timeout_seconds": 0}, r"comm.train_timeout_seconds = 0 must be at least 1"),
        (
            {"context_parallel__settings": "auto", "context_parallel__hidden_states": "host"},
            "chooses what is set by hand as well: context_parallel.hidden_states = 'host'",
        ),
        (
            {"context_parallel__settings": "auto", "context_parallel__tile_size": 512},
            r'settings = "auto" chooses what is set by hand as well: context_parallel.tile_size = 512, '
            r"activation_checkpoint.mode = 'none'; remove these",
        ),
        (
            {"context_parallel__stash_budget_gib": "nan", "context_parallel__stash": "host"},
            r"stash_budget_gib = nan must be a finite number of GiB; 0 = no limit",
        ),
        (
            {"context_parallel__stash_budget_gib": "inf", "context_parallel__stash": "host"},
            r"stash_budget_gib = inf must be a finite number",
        ),
        (
            {"activation_checkpoint__mode": "selective", "activation_checkpoint__selective_ac_option": "ops"},
            r"selective_ac_option = 'ops' must be \"op\" or a positive number n",
        ),
        (
            {"activation_checkpoint__mode": "selective", "activation_checkpoint__selective_ac_option": "0"},
            r"selective_ac_option = '0' must be",
        ),
        ({"activation_checkpoint__determinism_check": "some"}, r"determinism_check = 'some' is unknown"),
        ({"training__local_batch_size": 2, "training__global_batch_size": 3}, r"= 3 must be a multiple of .*: 2 or 4"),
        ({"context_parallel__head_chunk": 9}, r"head_chunk = 9 must be between 1 and 8, .*; nearest: 8"),
        ({"context_parallel__head_chunk": -1}, r"head_chunk = -1 must be between 1 and 8, .*; nearest: 1"),
        (
            {"context_parallel__head_chunk": 4, "context_parallel__method": "ulysses"},
            r"head_chunk = 4 has no meaning for method = \"ulysses\"",
        ),
        ({"parallelism__context_parallel_degree": 8}, r"= 8 is larger than the world of 4 ranks; start 8 ranks"),
        ({"parallelism__context_parallel_degree": 3}, r"= 3 x .* do not make the world of 4 ranks"),
        ({"parallelism__data_parallel_shard_degree": 2}, r"data_parallel_shard_degree = 2 do not make the world of 4"),
        ({"parallelism__context_parallel_degree": 0}, r"context_parallel_degree = 0 must be at least 1"),
        ({"parallelism__context_parallel_load_balancer": "headtail"}, r"'headtail' permutes the sequence"),
        ({"parallelism__tensor_parallel_degree": 2}, r"tensor parallelism does not work with llama3_upipe yet"),
        ({"parallelism__pipeline_parallel_degree": 2}, r"pipeline parallelism does not work"),
        ({"parallelism__expert_parallel_degree": 2}, r"expert parallelism does not work"),
        ({"activation_checkpoint__mode": "memory_budget"}, r"'memory_budget' does not work .* needs torch.compile"),
        ({"comm__mode": "local_tensor"}, r'comm.mode = "local_tensor" does not work .* set comm.mode = "default"'),
        ({"model__converters": "float8"}, r"model converters does not work"),
        ({"model__name": "llama3"}, r"model.name = 'llama3' is unknown here; choose one of llama3_upipe, qwen3_upipe"),
        ({"model__flavor": "9B"}, r"model.flavor = '9B' is unknown for llama3_upipe; choose one of .*8B"),
        ({"model__flavor": "8B_flex"}, r"'8B_flex' uses flex attention"),
        ({**QWEN, "model__flavor": "debugmodel_moe"}, r"a mixture of experts does not work with qwen3_upipe yet"),
        ({"model__hf_assets_path": "nowhere"}, r"model.hf_assets_path = 'nowhere' holds no tokenizer"),
        ({"training__dataset": "c5"}, r"training.dataset = 'c5' is unknown; choose one of c4"),
        ({"training__dataset": "local"}, r"training.dataset = \"local\" needs training.dataset_path"),
        ({"training__dataset": "c4_test"}, r"reads tests/assets/c4_test, which is part of TorchTitan's source tree"),
        (
            {"training__dataset": "local", "training__dataset_path": "/no/such/folder"},
            r"training.dataset_path = '/no/such/folder' does not exist",
        ),
        ({"context_parallel__attention_kernel": "flash3"}, r"'flash3' runs on CUDA only and this job runs on cpu"),
        # the command line itself
        ({"context_parallel__method": "rink"}, r"command line: .*rink"),
        ({"context_parallel__head_chunk": "many"}, r"command line: .*many"),
        (
            {"context_parallel__head_chunks": 4},
            r"unknown field context_parallel.head_chunks; .*context_parallel.head_chunk\.$",
        ),
        ({"context_parallel__ring_degree": 3}, r"ring_degree = 3 must divide context_parallel_degree = 4"),
        (
            {"context_parallel__ring_degree": 2, "context_parallel__method": "ring"},
            r"method = \"ring\" leave it out",
        ),
        ({"context_parallel__tile_size": -1}, r"context_parallel.tile_size = -1 must be a number of rows, or 0"),
        ({"context_parallel__query_tiles": 0}, r"query_tiles = 0 must be between 1 and 64, .*; nearest: 1"),
        (
            {"context_parallel__query_tiles": 2, "context_parallel__method": "ring"},
            r"query_tiles = 2 has no meaning for method = \"ring\"",
        ),
        (
            {"context_parallel__sequence_chunk": 1024},
            r"sequence_chunk = 1024 has no meaning for method = \"upipe\"",
        ),
        (
            {"context_parallel__sequence_chunk": 3, "context_parallel__method": "fpdt"},
            r"sequence_chunk = 3 leaves some of the 4 context-parallel ranks without a token .*; set it to 4 or more",
        ),
        (
            {"context_parallel__ring_degree": 2, "context_parallel__method": "fpdt"},
            r"ring_degree = 2 has no meaning for method = \"fpdt\"",
        ),
        (
            {"context_parallel__query_tiles": 2, "context_parallel__method": "fpdt"},
            r"query_tiles = 2 has no meaning for method = \"fpdt\"",
        ),
        (
            {"context_parallel__head_chunk": 4, "context_parallel__method": "fpdt"},
            r"head_chunk = 4 has no meaning for method = \"fpdt\"",
        ),
        ({"context_parallel__stash_budget_gib": 2}, r"stash_budget_gib = 2 limits host memory for stash = \"host\""),
    ],
)
def test_refused(options: dict[str, object], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        read_job(job_args(tmp_path, 4, **options))


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--activation_checkpoint.offload"], r"mode = 'none' does not checkpoint every block; set .*mode = \"full\""),
        (["--compile.enable"], r"torch.compile does not work with llama3_upipe yet; set compile.enable = false"),
        (
            [
                "--training.enable_cpu_offload",
                *("--parallelism.context_parallel_degree", "1", "--parallelism.data_parallel_replicate_degree", "4"),
            ],
            r"training.enable_cpu_offload = true moves .* nothing where each of the 4 ranks is a replica; remove it",
        ),
        (["--profiling.enable_profiling"], r"profiling.enable_profiling = true works on CUDA only"),
        (["--profiling.enable_memory_snapshot"], r"enable_memory_snapshot = true works on CUDA only"),
        (["--checkpoint.async_mode", "async_with_pinned_mem"], r"\"async_with_pinned_mem\" works on CUDA only"),
        (["--training.gc_debug"], r"training.gc_debug = true works on CUDA only"),
        (["--lr_scheduler.total_steps", "9"], r"total_steps = 9 must be at least training.steps = 10: beyond its end"),
        (["--optimizer.early_step_in_backward"], r"early_step_in_backward = true changes weights while backward runs"),
        (["--fault_tolerance.enable"], r"fault tolerance does not work"),
        (["--validation.enable", "--validation.seq_len", "3"], r"validation.seq_len = 3 leaves some of the 4"),
        (["--checkpoint.enable", "--checkpoint.initial_load_path", "no"], r"initial_load_path = 'no' is not a folder"),
        (["--validation.enable", "--validation.steps", "2", "--validation.freq", "0"], r"validation.freq = 0 must be"),
        (["--validation.enable", "--validation.steps", "0"], r"command line: validation steps must be positive or -1"),
        (
            ["--validation.enable", "--parallelism.context_parallel_degree", "2"],
            r"validation.steps = -1 takes all data, of which the 2 data-parallel ranks .*; set validation.steps",
        ),
        (["--checkpoint.enable", "--checkpoint.interval", "0"], r"checkpoint.interval = 0 must be at least 1"),
        (["--checkpoint.enable", "--checkpoint.keep_latest_k", "1"], r"keep_latest_k = 1 would delete the last"),
        (
            ["--checkpoint.enable", "--checkpoint.load_step", "7"],
            r"load_step = 7 is not there in .*: no step is finished there; leave it out",
        ),
        (["--checkpoint.create_seed_checkpoint"], r"writes nothing without checkpoint.enable = true"),
        (["--checkpoint.enable", "--checkpoint.create_seed_checkpoint"], r"is for one rank, and this job has 4"),
        (["--checkpoint.enable", "--checkpoint.initial_load_in_hf"], r"holds no weights \(\*.safetensors\); set"),
        (
            ["--metrics.enable_tensorboard", "--job.dump_folder", "/proc/x"],
            r"job.dump_folder: nothing can be written to",
        ),
        (
            ["--checkpoint.enable", "--job.dump_folder", "/dev/null/x", "--metrics.no-enable_tensorboard"],
            r"checkpoint.folder: nothing can be written to",
        ),
        (
            ["--checkpoint.enable", "--checkpoint.last_save_in_hf", "--checkpoint.no-last_save_model_only"],
            r"last_save_in_hf = true saves a model only, and would fail after the last step",
        ),
        (["--job.custom_config_module", "no.such"], r"custom_config_module cannot be used \(No module named 'no'\)"),
        (["--job.custom_config_module", "torchtitan.config.job_config"], r"must be \"torchtitan_upipe.job_config\""),
    ],
)
def test_refused_flags(flags: list[str], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        read_job(job_args(tmp_path, 4, *flags))


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize(
    "text, sentence",
    [
        ("[context_parallel]\nhead_chunk = 'four'", r"context_parallel.head_chunk = 'four' is not of type int"),
        ("[context_parallel]\nhead_chunk = true", r"head_chunk = True is not of type int"),
        ("[context_parallel]\nmethod = 'rink'", r"method = 'rink' is not one of 'upipe', 'ulysses', 'ring'"),
        (
            "[context_parallel]\nhead_chunck = 4",
            r"unknown field context_parallel.head_chunck; .*context_parallel.head_chunk\.$",
        ),
        ("[context_paralel]\nhead_chunk = 4", r"unknown field context_paralel; the nearest known one is context_par"),
        ("[context_parallel]\ntile_size = 1.5", r"context_parallel.tile_size = 1.5 is not of type int"),
        ("context_parallel = 4", r"context_parallel is a section and cannot be set to 4"),
        ("[training]\nseq_len = 2048.5", r"training.seq_len = 2048.5 is not of type int"),
        ("[activation_checkpoint]\nmode = 'ful'", r"mode = 'ful' is not one of 'selective', 'full'"),
        ("[parallelism]\ncontext_parallel_load_balancer = ''", r"load_balancer = '' .*|cannot be an empty string"),
        ("[training", r"is not valid TOML"),
    ],
)
def test_refused_files(text: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=sentence):
        read_job(["--job.config_file", str(path)])


@pytest.mark.usefixtures("world")
def test_a_folder_that_would_hide_the_initial_weights(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    flags = ["--checkpoint.enable", "--checkpoint.initial_load_path", str(tmp_path)]
    with pytest.raises(ValueError, match=r"checkpoint exists but holds no complete checkpoint; .*remove the folder"):
        read_job(job_args(tmp_path, 4, *flags))


@pytest.mark.usefixtures("world")
def test_tokenizers_that_do_not_fit(tmp_path: Path) -> None:
    text = (ROOT / "torchtitan_upipe/assets/tokenizer/tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match=r"the tokenizer .*tokenizer.json cannot be read \(.*\); download it again"):
        read_job(job_args(tmp_path, 4, model__hf_assets_path=tmp_path))
    more = json.loads(text)
    more["model"]["vocab"]["unheard"] = len(more["model"]["vocab"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(more))
    with pytest.raises(ValueError, match=r"has 2049 tokens, and the model's vocabulary 2048; choose the model.flavor"):
        read_job(job_args(tmp_path, 4, model__hf_assets_path=tmp_path))


@pytest.mark.usefixtures("world")
def test_the_last_job_file_wins(tmp_path: Path) -> None:
    first, last = job_args(tmp_path, 4), tmp_path / "mine.toml"
    last.write_text(Path(first[1]).read_text().replace("steps = 30", "steps = 31"))
    shortened = [*first, "--job.config_file", str(last), "--training.seq_len", "64"]
    del shortened[shortened.index("--training.steps") : shortened.index("--training.steps") + 2]
    config = read_job(shortened)
    assert (config.training.steps, config.training.seq_len, config.job.config_file) == (31, 64, str(last))


def test_missing_file() -> None:
    with pytest.raises(ValueError, match=r"cannot read the job file 'no.toml': No such file"):
        read_job(["--job.config_file", "no.toml"])


def test_sections_are_known_without_naming_the_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    path = tmp_path / "job.toml"
    assets = ROOT / "torchtitan_upipe/assets/tokenizer"
    path.write_text(
        f"[model]\nname = 'llama3_upipe'\nflavor = 'debug'\nhf_assets_path = '{assets}'\n"
        "[training]\ndataset = 'stdlib'\n[context_parallel]\nhead_chunk = 4\nstash = 'none'\n"
        "[activation_checkpoint]\nmode = 'full'\noffload = true\n"
    )
    config = read_job(["--job.config_file", str(path), "--context_parallel.head_chunk", "8"])
    assert config.context_parallel.head_chunk == 8  # the command line wins
    assert config.context_parallel.stash == "none"
    assert config.activation_checkpoint.offload
    assert config.parallelism.context_parallel_load_balancer is None


JOB_FILES = sorted((ROOT / "train_configs").glob("*.toml"))


@pytest.mark.parametrize("path", JOB_FILES, ids=lambda p: p.stem)
def test_shipped_jobs_are_accepted(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the GPUs they are written for; only the tokenizer, which is downloaded with a model, stands in."""
    monkeypatch.chdir(ROOT)
    config = load_config(
        ["--job.config_file", str(path), "--model.hf_assets_path", "torchtitan_upipe/assets/tokenizer"]
    )
    p = config.parallelism
    world_size = p.context_parallel_degree * p.data_parallel_replicate_degree * p.data_parallel_shard_degree
    validate_job(config, SPECS[config.model.name]().model_args[config.model.flavor], world_size, "cuda")
    assert len(path.read_text().splitlines()) < 80
    assert config.activation_checkpoint.mode == "full"


def test_the_debug_job_is_accepted_on_any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert read_job(["--job.config_file", "train_configs/llama3_debug.toml"]).training.steps > 0


def test_jobs_of_the_published_contexts_are_there() -> None:
    names = {path.stem for path in JOB_FILES}
    contexts = ["128k", "256k", "512k", "1m", "2m", "3m", "4m", "5m"]
    assert names >= {f"llama3_8b_{c}" for c in contexts} | {f"qwen3_32b_{c}" for c in contexts[:-1]}
