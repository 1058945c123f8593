"""No token is lost or seen twice: whole batches against the shares of all ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.strategies import patient
from torchtitan_upipe.data.documents import find_documents, pad_documents, positions_in_documents
from torchtitan_upipe.data.sharding import length_divisor, shard_positions
from torchtitan_upipe.job.load import load_config
from torchtitan_upipe.kernels.visibility import Documents
from torchtitan_upipe.titan.batch import shard_batch

BATCH, EOS, IGNORED = 2, 0, -100  # what torch.nn.functional.cross_entropy ignores

Share = tuple[Tensor, Tensor, dict[str, Any]]


@st.composite
def inputs(draw: st.DrawFn) -> Tensor:
    """Token ids ``[B, S]`` of documents of any length, one token (its end) among them."""
    length = draw(st.integers(1, 50))
    row = st.lists(st.integers(EOS, 4), min_size=length, max_size=length)
    return torch.tensor(draw(st.lists(row, min_size=1, max_size=3)))


@settings(patient, max_examples=50)
@given(inputs(), st.integers(0, 9))
@example(torch.tensor([[1, 2, EOS]]), 0)  # nothing begins after the last token
@example(torch.tensor([[EOS, EOS, 1], [1, 1, 1]]), 2)
def test_documents_end_with_their_last_token(tokens: Tensor, padding: int) -> None:
    length = tokens.shape[1]
    documents = pad_documents(find_documents(tokens, EOS), length, length + padding)
    positions = positions_in_documents(documents, length + padding)
    for row, starts, found in zip(tokens.tolist(), documents.starts, positions.tolist(), strict=True):
        ids = [*row, *[1] * padding]
        begins = [t for t in range(len(ids)) if t in (0, length) or (t < length and ids[t - 1] == EOS)]
        assert list(starts) == begins
        assert found == [t - max(begin for begin in begins if begin <= t) for t in range(len(ids))]


def test_nothing_is_added_where_nothing_is_padded() -> None:
    documents = Documents(((0, 3), (0,)))
    assert pad_documents(documents, 8, 8) is documents


def config(method: str, ring_degree: int, packed: bool) -> Any:
    options = ["--context_parallel.method", method, "--context_parallel.ring_degree", str(ring_degree)]
    return load_config([*options, *(["--training.document_mask"] if packed else [])])


def shares(tokens: Tensor, labels: Tensor, degree: int, job_config: Any) -> list[Share]:
    """What each rank is given."""
    found = []
    for rank in range(degree):
        mesh = SimpleNamespace(get_local_rank=lambda rank=rank: rank, size=lambda: degree) if degree > 1 else None
        dims = SimpleNamespace(get_optional_mesh={"cp": mesh}.get)
        found.append(shard_batch(tokens, labels, dims, job_config, EOS))
    return found


def draw_batch(length: int) -> tuple[Tensor, Tensor]:
    """Random tokens, a sixth of them ends of documents, and labels that say where they stand."""
    tokens = torch.randint(EOS, 6, (BATCH, length), generator=torch.Generator().manual_seed(length))
    return tokens, torch.arange(BATCH * length).view(BATCH, length)


@pytest.mark.parametrize("packed", [False, True], ids=["causal", "packed"])
@pytest.mark.parametrize(
    "method, degree, ring_degree",
    [
        ("upipe", 4, 1),  # contiguous
        ("ulysses", 3, 1),
        ("ring", 4, 1),  # zigzag
        ("ring", 3, 1),
        ("upipe", 4, 2),  # hybrid
        ("ulysses", 6, 2),
        ("upipe", 6, 3),
    ],
)
def test_every_token_is_on_one_rank(method: str, degree: int, ring_degree: int, packed: bool) -> None:
    layout = (1, degree) if method == "ring" else (degree // ring_degree, ring_degree)
    job_config = config(method, ring_degree, packed)
    for length in (8, 13, 24, 37, 61):
        tokens, labels = draw_batch(length)
        documents = find_documents(tokens, EOS)
        positions = positions_in_documents(documents, length) if packed else torch.arange(length).expand(BATCH, -1)
        by_rank = shares(tokens, labels, degree, job_config)

        # side by side as the ranks hold them
        got, got_labels = (torch.cat([share[i] for share in by_rank], dim=1) for i in (0, 1))
        got_positions = torch.cat([share[2]["positions"] for share in by_rank], dim=1)
        padded = got.shape[1]
        assert {share[0].shape[1] for share in by_rank} == {padded // degree}
        assert 0 <= padded - length < length_divisor(*layout)

        # a label names its token: each is there once, with its token and its position
        real = got_labels != IGNORED
        names = got_labels[real]
        assert torch.equal(names.sort().values, labels.flatten())
        assert torch.equal(got[real], tokens.flatten()[names])
        assert torch.equal(got_positions[real], positions.flatten()[names])
        assert real.sum(dim=1).tolist() == [length] * BATCH
        assert int(got_positions.max()) < length  # the table of RoPE ends there

        # in the order that attention takes for granted
        order = torch.cat([shard_positions(padded, rank, *layout) for rank in range(degree)])
        in_order = got_labels[:, order.argsort()]
        assert torch.equal(in_order[:, :length], labels)
        assert (in_order[:, length:] == IGNORED).all()

        for share in by_rank:  # padding is a document of its own
            masks = {"attention_masks": pad_documents(documents, length, padded)} if packed else {}
            assert {name: value for name, value in share[2].items() if name != "positions"} == masks


def test_one_rank_keeps_its_batch() -> None:
    tokens, labels = draw_batch(13)
    ((got, got_labels, kwargs),) = shares(tokens, labels, 1, config("upipe", 1, packed=False))
    assert got is tokens
    assert got_labels is labels
    assert not kwargs
    ((got, got_labels, kwargs),) = shares(tokens, labels, 1, config("upipe", 1, packed=True))
    documents = find_documents(tokens, EOS)
    assert torch.equal(got, tokens)
    assert torch.equal(got_labels, labels)
    assert kwargs["attention_masks"] == documents
    assert torch.equal(kwargs["positions"], positions_in_documents(documents, 13))


def test_documents_need_a_token_that_ends_them() -> None:
    dims = SimpleNamespace(get_optional_mesh={"cp": None}.get)
    with pytest.raises(ValueError, match="document_mask = true needs a tokenizer with an end-of-sequence token"):
        shard_batch(*draw_batch(8), dims, config("upipe", 1, packed=True), eos_id=None)
