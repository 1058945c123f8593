"""Conversations: what is trained on, how they are packed, where they go on; the loss of four ranks is that of one."""

from __future__ import annotations

import json
import pickle
import random
import shutil
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torch import Tensor

from tests.jobs import from_seed, job_args, seed_checkpoint, train
from tests.pretrained import TOKENIZER
from tests.test_train import LLAMA, METHODS, ULYSSES, assert_same
from torchtitan_upipe.data.chat import ChatStream, ChatTemplate, Encoded, load_chat
from torchtitan_upipe.data.reader import Reader
from torchtitan_upipe.job.read import read_job

TURN = "{{ m.role }}:\n"
SAID = "{{ m.content }}{{ eos_token }}"
TEMPLATE = (  # begin of text; a turn ends with the end of text and a line feed; tools and system messages are shown
    "{{ bos_token }}{% if tools %}{{ tools | tojson }}{{ '\\n' }}{% endif %}{% for m in messages %}" + TURN
) + "BODY{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}assistant:{{ '\\n' }}{% endif %}"
IF_SAID = "{% if m.role == 'assistant' %}HERE{% else %}" + SAID + "{% endif %}"
PREFIXES = TEMPLATE.replace("BODY", SAID)
MARKED = TEMPLATE.replace("BODY", IF_SAID.replace("HERE", "{% generation %}" + SAID + "{% endgeneration %}"))
STOP_BEHIND = TEMPLATE.replace(
    "BODY", IF_SAID.replace("HERE", "{% generation %}{{ m.content }}{% endgeneration %}{{ eos_token }}")
)
LAST_DIFFERS = PREFIXES.replace(
    "{{ m.content }}", "{{ m.content }}{% if m.role == 'assistant' and not loop.last %} (old){% endif %}"
)
NO_ROLES = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
ALL_MARKED = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"

TALK = [
    {"role": "system", "content": "Answer in numbers."},
    {"role": "user", "content": "one and one"},
    {"role": "assistant", "content": "two"},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "three, then"},
]


@pytest.fixture
def assets(tmp_path: Path) -> Callable[[str | None], Path]:
    """A tokenizer with the given chat template."""

    def make(template: str | None) -> Path:
        folder = tmp_path / "tokenizer"
        shutil.copytree(TOKENIZER, folder, dirs_exist_ok=True)
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        return folder

    return make


def row(messages: Any, tools: Any = None) -> dict[str, Any]:
    return {"messages": messages, "tools": tools, "place": "chat.jsonl, line 7"}


@pytest.mark.parametrize("template", [PREFIXES, MARKED, STOP_BEHIND], ids=["prefixes", "marked", "stop behind"])
def test_what_the_assistant_says_is_trained_on_with_its_stop(template: str, assets: Any) -> None:
    chat = ChatTemplate(str(assets(template)))
    tokens, said = chat(row(TALK, [{"name": "add"}]))
    decode = chat.tokenizer.decode
    assert decode(tokens).startswith('<|begin_of_text|>[{"name": "add"}]\nsystem:\nAnswer in numbers.<|end_of_text|>\n')
    trained = decode([token for token, by in zip(tokens, said, strict=True) if by])
    assert trained == "two<|end_of_text|>three, then<|end_of_text|>"
    assert sum(tokens[i] == chat.tokenizer.eos_token_id for i in range(len(tokens)) if said[i]) == 2


@pytest.mark.parametrize(
    "template, sentence",
    [
        (None, r"tokenizer has no chat template \(chat_template.jinja, or"),
        (NO_ROLES, r"does not say where the assistant begins"),
        (ALL_MARKED, r"does not say where the assistant begins"),
    ],
)
def test_a_template_that_knows_no_roles_is_refused(template: str | None, sentence: str, assets: Any) -> None:
    with pytest.raises(ValueError, match=sentence):
        ChatTemplate(str(assets(template)))


def test_a_conversation_that_the_template_does_not_take_is_refused(assets: Any) -> None:
    chat = ChatTemplate(str(assets(LAST_DIFFERS)))
    assert sum(chat(row(TALK[:3]))[1]) > 1
    with pytest.raises(ValueError, match=r"chat.jsonl, line 7: .* writes message 3 otherwise once others follow"):
        chat(row(TALK))
    with pytest.raises(ValueError, match=r"line 7: the assistant speaks first"):
        chat(row(TALK[2:]))
    refusing = PREFIXES + "{% if messages | length > 2 %}{{ raise_exception('too long') }}{% endif %}"
    with pytest.raises(ValueError, match=r"line 7: the chat template in .* refuses the messages \(too long\)"):
        ChatTemplate(str(assets(refusing)))(row(TALK))


# --- files ------------------------------------------------------------------------------------------------------------


def test_files_of_both_kinds_hold_the_same(tmp_path: Path) -> None:
    talks = [TALK, TALK[:3]]
    for folder in ("jsonl", "parquet"):
        (tmp_path / folder).mkdir()
    (tmp_path / "jsonl" / "a.jsonl").write_text("".join(json.dumps({"messages": t}) + "\n" for t in talks))
    named = [[{**m, "name": None} for m in talk] for talk in talks]
    pq.write_table(pa.table({"id": [1, 2], "messages": named}), tmp_path / "parquet" / "a.parquet")
    read = [[r["messages"] for r in load_chat(str(tmp_path / kind))] for kind in ("jsonl", "parquet")]
    assert read == [talks, talks]


@pytest.mark.parametrize(
    "line, sentence",
    [
        ('{"messages": []}', r"line 2: 'messages' holds \[\] where a list of messages is expected"),
        ('{"messages": "hello"}', r"line 2: 'messages' holds 'hello' where a list"),
        ('{"messages": ["hello"]}', r"line 2: message 1 is a str, not an object"),
        ('{"messages": [{"content": "a"}]}', r"line 2: message 1 has no role"),
        ('{"messages": [{"role": "user"}]}', r"line 2: message 1 has no text as its content"),
        ('{"messages": [{"role": "user", "content": [1]}]}', r"message 1 has no text"),
        ('{"text": "a"}', r"line 2: no column 'messages' but 'text'; rename the column"),
        ('{"messages": [{"role": "user", "content": "a"}], "tools": "x"}', r"'tools' holds a str where a list"),
        ("[1]", r"line 2: a list where an object with a field 'messages' is expected"),
        ("{", r"line 2: no valid JSON"),
    ],
)
def test_a_malformed_conversation_is_named(line: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": TALK}) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=sentence):
        list(load_chat(str(tmp_path)))


def test_empty_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no .jsonl or .parquet file"):
        load_chat(str(tmp_path))
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"holds no conversation: its 1 files are empty"):
        load_chat(str(tmp_path))


# --- sequences --------------------------------------------------------------------------------------------------------

LENGTH = 32


def encode(row: dict[str, Any]) -> Encoded:
    """A conversation number n of m tokens: n * 100 + 1, n * 100 + 2, ..; the second half is the assistant's."""
    number, length = map(int, row["messages"][0]["content"].split())
    return [number * 100 + i for i in range(length)], [i >= length // 2 for i in range(length)]


LENGTHS = [random.Random(i).randint(2, LENGTH + 1) for i in range(40)]


def stream(
    folder: Path, lengths: list[int], packed: bool = True, cut: bool = False, endless: bool = True, **place: int
) -> ChatStream:
    folder.mkdir(exist_ok=True)
    lines = [{"messages": [{"role": "user", "content": f"{i} {n}"}]} for i, n in enumerate(lengths, 1)]
    (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    reader = Reader(load_chat(str(folder)), source="these", **place)
    return ChatStream(reader, encode, LENGTH, packed=packed, cut=cut, endless=endless)


def conversations(example: tuple[dict[str, Tensor], Tensor]) -> list[tuple[list[int], list[int]]]:
    """Inputs and labels of each document of an example, padding left out."""
    inputs, labels = example[0]["input"], example[1]
    assert inputs.shape == labels.shape == (LENGTH,)
    starts = example[0]["starts"].nonzero().flatten().tolist() if "starts" in example[0] else [0]
    parts = [(inputs[a:b].tolist(), labels[a:b].tolist()) for a, b in zip(starts, [*starts[1:], LENGTH], strict=True)]
    return [(i[: i.index(0)] if 0 in i else i, n) for i, n in parts if i[0] != 0]


@pytest.mark.parametrize("packed", [True, False])
def test_every_conversation_is_once_in_a_sequence_with_its_own_labels(packed: bool, tmp_path: Path) -> None:
    examples = list(stream(tmp_path, LENGTHS, packed, endless=False))
    seen = [conversation for example in examples for conversation in conversations(example)]
    assert sorted(inputs[0] // 100 for inputs, _ in seen) == list(range(1, 41))
    for inputs, labels in seen:
        number, length = inputs[0] // 100, LENGTHS[inputs[0] // 100 - 1]
        assert inputs == [number * 100 + i for i in range(length - 1)]
        expected = [number * 100 + i if i >= length // 2 else -100 for i in range(1, length)]
        assert labels[: length - 1] == expected
        assert set(labels[length - 1 :]) <= {-100}
    if packed:
        assert len(examples) < 1.2 * sum(LENGTHS) / LENGTH
    else:
        assert len(examples) == 40


def test_longer_ones_are_cut_or_dropped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lengths = [10, LENGTH + 1, LENGTH + 2, 1, 3 * LENGTH, 12]  # the fifth is cut before the assistant speaks
    for cut, kept in ((False, [10, 33, 12]), (True, [10, 33, 33, 12])):
        caplog.clear()
        with caplog.at_level("INFO"):
            examples = list(stream(tmp_path, lengths, packed=False, cut=cut, endless=False))
        assert [len(conversations(example)[0][0]) + 1 for example in examples] == kept
        (line,) = [record.getMessage() for record in caplog.records if "conversations read" in record.getMessage()]
        what, silent = ("2 cut to", 2) if cut else ("2 dropped as longer than", 1)
        assert f"these: 6 conversations read, {what} 32 tokens and {silent} left out in which the assistant" in line
    with pytest.raises(ValueError, match=r"rank 0 can train on none of its 2 conversations, 2 dropped as longer"):
        next(iter(stream(tmp_path, [50, 60])))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("stop", [1, 7, 30])
def test_a_resumed_stream_goes_on_where_it_was(packed: bool, stop: int, tmp_path: Path) -> None:
    whole = [conversations(example) for example in islice(stream(tmp_path, LENGTHS, packed), stop + 20)]
    first = stream(tmp_path, LENGTHS, packed)
    assert [conversations(example) for example in islice(first, stop)] == whole[:stop]
    resumed = stream(tmp_path, LENGTHS, packed)
    resumed.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    assert [conversations(example) for example in islice(resumed, 20)] == whole[stop:]


@pytest.mark.parametrize("before, after", [(1, 3), (3, 2)])
def test_more_or_fewer_ranks_go_on_with_what_is_left(before: int, after: int, tmp_path: Path) -> None:
    seen: Counter[int] = Counter()

    def take(data: ChatStream, count: int | None) -> dict[str, Any]:
        for example in islice(data, count):
            seen.update(inputs[0] // 100 for inputs, _ in conversations(example))
        return data.state_dict()

    states = [take(stream(tmp_path, LENGTHS, rank=r, ranks=before, endless=False), 2 + r) for r in range(before)]
    for rank in range(after):
        new = stream(tmp_path, LENGTHS, rank=rank, ranks=after, endless=False)
        new.load_states(states)
        take(new, None)
    assert seen == Counter(range(1, 41))


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return seed_checkpoint(tmp_path_factory.mktemp("seed"), **LLAMA)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Conversations of 1 to 4 turns, of which some fill a quarter of a sequence and none more than it has."""
    folder, draw = tmp_path_factory.mktemp("chat"), random.Random(0)
    shutil.copytree(TOKENIZER, folder / "tokenizer")
    (folder / "tokenizer" / "chat_template.jinja").write_text(PREFIXES)
    with (folder / "chat.jsonl").open("w") as out:
        for _ in range(60):
            roles = ["user", "assistant"] * draw.randint(1, 2)
            talk = [{"role": r, "content": " ".join(draw.choices("abcdefgh", k=draw.randint(1, 12)))} for r in roles]
            out.write(json.dumps({"messages": talk}) + "\n")
    return {
        "training__dataset": "chat",
        "training__dataset_path": folder / "chat.jsonl",
        "model__hf_assets_path": folder / "tokenizer",
        "training__seq_len": 122,  # padded to 124 on 4 ranks
        "training__steps": 4,
    }


@pytest.mark.parametrize("packed", [True, False])
def test_four_ranks_log_what_one_logs(packed: bool, seed: Path, chat: dict[str, Any], tmp_path: Path) -> None:
    """Padded, the last ranks of a short conversation hold no label at all."""
    options = LLAMA | chat | {"training__document_mask": packed}
    one = train(tmp_path / "one", 1, *from_seed(seed), **options, **ULYSSES)
    assert all(0 < loss < 10 for loss in one.loss)
    for name in ("upipe", "hybrid_ulysses"):
        assert_same(train(tmp_path / name, 4, *from_seed(seed), **(options | METHODS[name])), one)


def test_the_loss_is_the_mean_over_the_whole_batch(seed: Path, chat: dict[str, Any], tmp_path: Path) -> None:
    """Four conversations of unequal length a step: one rank in four micro-batches, or two by two on four ranks."""
    options = LLAMA | chat | {"training__local_batch_size": 1, "training__global_batch_size": 4}
    one = train(tmp_path / "one", 1, *from_seed(seed), **options, **ULYSSES)
    split = {"parallelism__context_parallel_degree": 2, "parallelism__data_parallel_shard_degree": 2}
    assert_same(train(tmp_path / "four", 4, *from_seed(seed), **(options | ULYSSES | split)), one)
    at_once = {"training__local_batch_size": 4}
    assert_same(train(tmp_path / "wide", 1, *from_seed(seed), **(options | ULYSSES | at_once)), one)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"training__dataset": "chat"}, r'training.dataset = "chat" needs training.dataset_path'),
        ({"training__longer_conversations": "cut"}, r'"cut" is about conversations, and no dataset is "chat"'),
        (
            {"training__dataset": "chat", "training__dataset_path": ".", "training__packing": "first_fit"},
            r"packing = \"first_fit\" is about text",
        ),
        (
            {"training__packing": "first_fit", "training__labels_across_documents": True},
            r"keeps them apart; remove one",
        ),
        (
            {"training__dataset": "chat", "training__dataset_path": ".", "training__labels_across_documents": True},
            r"labels_across_documents = true is about text",
        ),
    ],
)
def test_jobs_that_cannot_be_are_refused(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        read_job(job_args(tmp_path, 1, **changes))
