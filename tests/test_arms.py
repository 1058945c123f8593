"""The plan of a sweep: its arms, and what is refused; the jobs that are compared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import ab, arms
from benchmarks.arms import Arm, Run
from benchmarks.prediction import Prediction
from tests.jobs import ROOT
from tests.test_benchmarks import sweep_arguments
from tests.test_config import JOB_FILES
from torchtitan_upipe.job.check import validate_job
from torchtitan_upipe.job.load import load_config
from torchtitan_upipe.job.read import read_job
from torchtitan_upipe.titan.specs import SPECS


def test_arms_are_interleaved_round_by_round() -> None:
    runs = arms.plan(arms.spell_arms(["upipe", "ring"], [4, 8]), [1024, 2048], 2, default_chunk=2)
    first = [Arm("upipe", 4, 1024), Arm("upipe", 8, 1024), Arm("ring", 0, 1024)]
    first += [replace(arm, seq_len=2048) for arm in first]
    assert runs == [Run(arm, 0) for arm in first] + [Run(arm, 1) for arm in first]
    assert len({run.key for run in runs}) == len(runs)
    assert arms.plan(arms.spell_arms(["upipe"], []), [1024], 1, default_chunk=2)[0].arm.head_chunk == 2


def test_an_arm_is_a_method_and_fields() -> None:
    text = "upipe stash=none head_chunk=4 query-tiles=2 activation_checkpoint.offload=true"
    arm = arms.parse_arm(text, 1024, default_chunk=8)
    assert arm == Arm("upipe", 4, 1024, "activation_checkpoint.offload=true query_tiles=2 stash=none")
    assert arm.name == "upipe U=4 activation_checkpoint.offload=true query_tiles=2 stash=none"
    assert arms.parse_arm("upipe context_parallel.stash=none", 1024, 8) == Arm("upipe", 8, 1024, "stash=none")
    assert arms.parse_arm("ulysses", 1024, 8) == Arm("ulysses", 0, 1024)
    assert Run(Arm("upipe", 4, 1024, "query_tiles=2 stash=none"), 1).key == "upipe-U4-query_tiles=2-stash=none-S1024-r1"
    assert Run(Arm("upipe", 4, 1024), 0).key == "upipe-U4-S1024-r0"

    job = ["--job.config_file", str(ROOT / "benchmarks/cpu_ab.toml"), "--context_parallel.stash", "device"]
    config = load_config([*job, *arm.overrides])
    assert (config.context_parallel.head_chunk, config.context_parallel.query_tiles) == (4, 2)
    assert config.context_parallel.stash == "none"  # an arm overrides the command line
    assert config.activation_checkpoint.offload
    assert config.training.seq_len == 1024


def test_arms_on_the_command_line(tmp_path: Path) -> None:
    words = ["ulysses", "upipe", "upipe head_chunk=2 optimizer.lr=1e-4"]
    sweep = ab.parse(sweep_arguments(tmp_path, "--arms", *words, "--seq_lens", "256", "--rounds", "1"))
    chunked = Arm("upipe", 2, 256, "optimizer.lr=1e-4")
    assert [run.arm for run in sweep.runs] == [Arm("ulysses", 0, 256), Arm("upipe", 4, 256), chunked]
    assert load_config([*sweep.job, *chunked.overrides]).optimizer.lr == 1e-4


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["head_chunk=4"], "the arm 'head_chunk=4' must begin with a method"),
        ([""], "the arm '' must begin with a method"),
        (["sulysses"], "the arm 'sulysses' cannot run: .*invalid choice 'sulysses'"),
        (["upipe stash"], "'stash' in the arm 'upipe stash' must be a field and its value"),
        (["upipe job.description=a/b"], "'job.description=a/b' in the arm"),
        (["upipe stsh=none"], "unknown field context_parallel.stsh; the nearest known one is context_parallel.stash"),
        (["upipe optimizer.rate=1"], "unknown field optimizer.rate"),
        (["upipe query_tiles=few"], "the arm 'upipe U=4 query_tiles=few' cannot run: "),
        (["upipe head_chunk=0"], "'0' is not a positive number"),
        (["ulysses head_chunk=4"], "sets head_chunk, which applies to"),
        (["upipe stash=none context_parallel.stash=host"], "sets stash twice"),
        (["upipe training.seq_len=4"], "sets training.seq_len, which is set by the sweep"),
        (["upipe method=ring"], "sets method, which is set by the sweep"),
        (["ulysses", "upipe stash=none query_tiles=2", "upipe query_tiles=2 stash=none"], "is named 2 times"),
        (["upipe", "--head_chunks", "4"], "--head_chunks belongs to --methods"),
    ],
)
def test_refused_arms(words: list[str], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        ab.parse(sweep_arguments(tmp_path, "--arms", *words, "--seq_lens", "256"))


@pytest.mark.parametrize("text, tokens", [("8k", 8192), ("1m", 2**20), ("1000", 1000), (" 3M ", 3 * 2**20)])
def test_lengths(text: str, tokens: int) -> None:
    assert arms.parse_count(text) == tokens
    assert arms.parse_count(arms.spell_length(tokens)) == tokens


@pytest.mark.parametrize(
    "options, sentence",
    [
        ("--methods upipe --seq_lens 8x", "'8x' is not a positive number"),
        ("--methods upipe,upipe --seq_lens 8k", "over 8K tokens is named 2 times; name it once"),
        ("--methods ring --seq_lens 8k,8192", "ring over 8K tokens is named 2 times"),
        ("--methods ring --seq_lens 8k --head_chunks 4", "--head_chunks applies to"),
        ("--methods upipe --seq_lens 8k --head_chunks 0", "'0' is not a positive number"),
        ("--methods , --seq_lens 8k", "at least one method"),
        ("--methods ring --seq_lens 8k --steps 0", "--steps 0 must be at least 1"),
        ("--methods ring --seq_lens 8k --training.seq-len 4", "--training.seq_len is set by the sweep"),
        ("--methods ring --seq_lens 8k --training.sequence 4", "unknown field training.sequence"),
    ],
)
def test_refused_sweeps(options: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        ab.parse([*options.split(), "--out", str(tmp_path), "--job.config_file", str(JOB_FILES[0])])


@pytest.mark.parametrize("path", JOB_FILES, ids=lambda p: p.stem)
def test_every_shipped_job_takes_every_method(path: Path) -> None:
    config = load_config(
        ["--job.config_file", str(path), "--model.hf_assets_path", str(ROOT / "torchtitan_upipe/assets/tokenizer")]
    )
    model_args, cp = SPECS[config.model.name]().model_args[config.model.flavor], config.context_parallel
    validate_job(config, model_args, arms.world_size(config), "cuda")
    for method in ("ulysses", "ring", "fpdt", "torchtitan"):
        overrides = Arm(method, 0, config.training.seq_len).overrides
        for name, value in zip(overrides[::2], overrides[1::2], strict=True):
            section, field = name.removeprefix("--").split(".")
            if section == "context_parallel":
                setattr(cp, field, type(getattr(cp, field))(value))
        validate_job(config, model_args, arms.world_size(config), "cuda")
        assert cp.method == method


@pytest.mark.parametrize("name, ranks", [("cpu_ab", 2), ("cpu_attention", 4)])
def test_the_comparisons_without_a_gpu_are_accepted(name: str, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    config = read_job(["--job.config_file", f"benchmarks/{name}.toml"])
    assert arms.world_size(config) == ranks


def test_attention_makes_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)

    def peak(text: str) -> Prediction:
        arm = arms.parse_arm(text, 16384, default_chunk=4)
        config = read_job(["--job.config_file", "benchmarks/cpu_attention.toml", *arm.overrides], world_size=0)
        prediction = ab.predict_here(config)
        assert prediction is not None
        assert ".attention " in prediction.moment
        return prediction

    assert peak("upipe stash=none query_tiles=2").device_bytes <= 0.65 * peak("ulysses").device_bytes
