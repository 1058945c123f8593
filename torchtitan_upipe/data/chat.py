"""Conversations: read, turned into tokens by the tokenizer's own chat template, and packed into sequences."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets import IterableDataset

from torchtitan_upipe.data import rows
from torchtitan_upipe.data.packing import OPEN, PackedStream
from torchtitan_upipe.data.reader import Reader
from torchtitan_upipe.tiled.loss import IGNORE_INDEX

COLUMN, TOOLS = "messages", "tools"
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
Encoded = tuple[list[int], list[bool]]  # tokens, and which of them the assistant says
logger = logging.getLogger(__name__)


def load_chat(path: str) -> IterableDataset:
    """Conversations of a ``.jsonl`` or ``.parquet`` file or of all below a folder, one a row, in order.

    A row has ``messages``, a list of objects with ``role`` and ``content`` (an assistant may have ``tool_calls``
    instead), and may have ``tools``, as the template takes them.

    Raises:
        ValueError: there is no such file, or none holds a conversation. A row that is none is named once it is met.
    """
    files = [str(file) for file in rows.find_files(path, rows.READERS)]
    if not files:
        raise ValueError(f"{path!r} holds no {' or '.join(rows.READERS)} file.")
    if next(read_conversations(files), None) is None:
        raise ValueError(f"{path!r} holds no conversation: its {len(files)} files are empty.")
    return IterableDataset.from_generator(read_conversations, gen_kwargs={"files": files})


def read_conversations(files: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Rows ``{"messages": .., "tools": .., "place": ..}`` of ``files``.

    Raises:
        ValueError: what is wrong, with the file and the line or row.
    """
    for name in files:
        file = Path(name)
        found = rows.read_jsonl(file, COLUMN) if file.suffix == ".jsonl" else rows.read_parquet(file, COLUMN, [TOOLS])
        for row, place in found:
            tools = row.get(TOOLS)
            if tools is not None and not isinstance(tools, list):
                raise ValueError(f"{place}: {TOOLS!r} holds a {type(tools).__name__} where a list is expected.")
            yield {COLUMN: _messages(row[COLUMN], place), TOOLS: tools or None, "place": place}


def _messages(messages: Any, place: str) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{place}: {COLUMN!r} holds {messages!r:.60} where a list of messages is expected.")
    checked = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise ValueError(f"{place}: message {number} is a {type(message).__name__}, not an object.")
        fields = {name: value for name, value in message.items() if value is not None}  # parquet fills up with these
        if not isinstance(fields.get("role"), str):
            raise ValueError(f"{place}: message {number} has no role, such as 'user' or 'assistant'.")
        if not isinstance(fields.get("content", "" if fields.get("tool_calls") else None), str):
            raise ValueError(f"{place}: message {number} has no text as its content.")
        checked.append(fields)
    return checked


class ChatTemplate:
    """The chat template of a tokenizer, rendered by ``transformers``.

    Which tokens the assistant says is what the template marks with ``{% generation %}``, or, where it does not, what
    an assistant's message adds to the prompt for it. The token that stops the assistant is one of them.

    Args:
        assets: a folder with a tokenizer, or its name on a hub.

    Raises:
        ValueError: there is no template, or it does not say where the assistant begins.
    """

    def __init__(self, assets: str) -> None:
        from transformers import AutoTokenizer  # takes seconds

        self.assets = assets
        self.tokenizer: Any = AutoTokenizer.from_pretrained(assets)
        if self.tokenizer.chat_template is None or not self.tokenizer.is_fast:
            raise ValueError(
                f"the tokenizer in {assets} has no chat template (chat_template.jinja, or chat_template in "
                'tokenizer_config.json), which dataset = "chat" needs; take that of a chat model.'
            )
        added = self.tokenizer.added_tokens_decoder
        self._special = {str(token) for token in added.values()}
        self._special_ids = set(added)
        self._check_roles()

    def __call__(self, row: dict[str, Any]) -> Encoded:
        """Tokens of a conversation, and which of them the assistant says.

        Raises:
            ValueError: the template refuses it, or a later turn changes an earlier one.
        """
        messages, tools, place = row[COLUMN], row[TOOLS], row["place"]
        try:
            if GENERATION.search(self.tokenizer.get_chat_template(None, tools)):
                return self._marked(messages, tools)
            return self._by_prefixes(messages, tools, place)
        except ValueError:
            raise
        except Exception as error:  # whatever a template raises, by jinja2's own class or by Python's
            text = str(error).strip().partition("\n")[0]
            raise ValueError(f"{place}: the chat template in {self.assets} refuses the messages ({text}).") from error

    def _check_roles(self) -> None:
        user = [{"role": "user", "content": "a"}]
        if GENERATION.search(self.tokenizer.get_chat_template(None, None)):
            knows = not any(self._marked(user, None)[1])
        else:
            knows = self._render(user, None, prompt=True) != self._render(user, None)
        if not knows:
            raise ValueError(
                f"the chat template in {self.assets} does not say where the assistant begins: it has no generation "
                "prompt, or marks what a user says; take that of a chat model."
            )

    def _render(self, messages: Sequence[dict[str, Any]], tools: Any, prompt: bool = False) -> str:
        text: str = self.tokenizer.apply_chat_template(
            list(messages), tools=tools, tokenize=False, add_generation_prompt=prompt
        )
        return text

    def _marked(self, messages: Sequence[dict[str, Any]], tools: Any) -> Encoded:
        found = self.tokenizer.apply_chat_template(
            list(messages), tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        tokens, said = list(found["input_ids"]), [bool(mark) for mark in found["assistant_masks"]]
        for at in range(1, len(tokens)):  # a stop that the template puts behind its marks
            stops = tokens[at] in self._special_ids and tokens[at - 1] not in self._special_ids
            if found["assistant_masks"][at - 1] and not said[at] and stops:
                said[at] = True
        return tokens, said

    def _by_prefixes(self, messages: Sequence[dict[str, Any]], tools: Any, place: str) -> Encoded:
        text = self._render(messages, tools)
        spans = []
        for at, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if at == 0:
                raise ValueError(f"{place}: the assistant speaks first, and nothing asks it to; begin with a user.")
            before, after = self._render(messages[:at], tools, prompt=True), self._render(messages[: at + 1], tools)
            if not (text.startswith(after) and after.startswith(before)):
                raise ValueError(
                    f"{place}: the chat template in {self.assets} writes message {at + 1} otherwise once others "
                    "follow, so what the assistant said there cannot be told; use a template with {% generation %} "
                    "marks, or end the conversation there."
                )
            end = after.rstrip()  # between the stop and what follows, which the assistant does not say
            spans.append((len(before), len(end) if end.endswith(tuple(self._special)) else len(after)))
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        starts = [start for start, _ in found["offset_mapping"]]
        return list(found["input_ids"]), [any(begin <= at < end for begin, end in spans) for at in starts]


class ChatStream(PackedStream):
    """Sequences of ``seq_len`` tokens from this rank's conversations; labels are of what the assistant says.

    Args:
        reader: the conversations.
        encode: from a row to tokens, and which of them the assistant says.
        seq_len: ``S``.
        packed: several conversations a sequence; else each has its own, padded.
        cut: keep the first ``seq_len`` tokens of a longer conversation, which otherwise is dropped.
        endless: begin again at the end.
    """

    def __init__(
        self,
        reader: Reader,
        encode: Callable[[dict[str, Any]], Encoded],
        seq_len: int,
        *,
        packed: bool,
        cut: bool,
        endless: bool = True,
    ) -> None:
        super().__init__(reader, seq_len, open_sequences=OPEN if packed else 0, marks=packed, endless=endless)
        self.encode = encode
        self.cut = cut
        self.read = self.longer = self.silent = 0  # conversations since the start

    def _add(self, row: dict[str, Any]) -> bool:
        tokens, said = self.encode(row)
        longer = len(tokens) > self.seq_len + 1
        tokens, said = tokens[: self.seq_len + 1], said[: self.seq_len + 1]
        silent = not any(said[1:])
        dropped = longer and not self.cut
        self.read += 1
        self.longer += longer
        self.silent += silent and not dropped
        if self.read in (100, 1000) or self.read % 10000 == 0:
            self._log()
        if silent or dropped:
            return False
        labels = [token if by else IGNORE_INDEX for token, by in zip(tokens[1:], said[1:], strict=True)]
        self._place((tokens[:-1], labels))
        return True

    def _end_pass(self, unused: bool) -> None:
        self._log()
        if unused:
            raise ValueError(
                f"{self.source}: data-parallel rank {self.reader.rank} can train on none of its {self.read} "
                f"conversations, {self._counts()}; raise the sequence length or look at the messages' roles."
            )

    def _counts(self) -> str:
        what = "cut to" if self.cut else "dropped as longer than"
        return (
            f"{self.longer} {what} {self.seq_len} tokens and {self.silent} left out in which the assistant says nothing"
        )

    def _log(self) -> None:
        logger.info(f"{self.source}: {self.read} conversations read, {self._counts()}")
