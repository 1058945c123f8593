"""The pieces against the mask's definition, pair by pair."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.strategies import patient
from torchtitan_upipe.cp.ring import zigzag_tokens
from torchtitan_upipe.cp.segments import QueryRows, query_tiles
from torchtitan_upipe.kernels.launches import rectangles
from torchtitan_upipe.kernels.visibility import Interval, Piece, Tokens, cut_rows, visible_pieces

LENGTH = 32

Pair = tuple[int, int]  # (query row, key row)


@st.composite
def intervals(draw: st.DrawFn, length: int = LENGTH) -> tuple[Interval, ...]:
    """Disjoint and rising; some touch."""
    edges = sorted(draw(st.lists(st.integers(0, length), max_size=8, unique=True)))
    return tuple(step for step in pairwise(edges) if draw(st.booleans()))


starts = st.sets(st.integers(1, LENGTH - 1), max_size=6).map(lambda later: (0, *sorted(later)))


@st.composite
def ring_shards(draw: st.DrawFn) -> tuple[Tokens, Tokens]:
    """Queries of one ring rank, perhaps a team's segment of them, and keys of another."""
    ring = draw(st.sampled_from([1, 2, 4]))
    mine, other = draw(st.integers(0, ring - 1)), draw(st.integers(0, ring - 1))
    degree = draw(st.sampled_from([1, 2, 4]))
    team = draw(st.sampled_from([t for t in (1, 2, 4) if degree % t == 0]))
    tokens = LENGTH // ring // degree
    tile = draw(st.sampled_from(query_tiles(tokens, draw(st.integers(1, 3)))))
    rows = QueryRows(team, degree, tokens, tile).computed_by(draw(st.integers(0, degree - 1)))
    return zigzag_tokens(LENGTH, mine, ring).rows(rows), zigzag_tokens(LENGTH, other, ring)


def positions(tokens: Tokens) -> list[int]:
    return [t for start, stop in tokens.intervals for t in range(start, stop)]


def visible_pairs(queries: Tokens, keys: Tokens, starts: tuple[int, ...]) -> set[Pair]:
    def document(t: int) -> int:
        return sum(start <= t for start in starts)

    return {
        (i, j)
        for i, query in enumerate(positions(queries))
        for j, key in enumerate(positions(keys))
        if key <= query and document(key) == document(query)
    }


def pairs_of(piece: Piece) -> set[Pair]:
    """The definition in ``Piece``'s docstring."""
    (first, stop), (first_key, stop_key) = piece.rows, piece.keys
    hidden = {
        (row, key) for row in range(first, stop) for key in range(stop_key - (stop - row) + 1, stop_key) if piece.causal
    }
    return {(row, key) for row in range(first, stop) for key in range(first_key, stop_key)} - hidden


def pairs_of_calls(piece: Piece) -> list[Pair]:
    """What the kernels are asked for."""
    found = []
    for (first, stop), (first_key, stop_key), causal in rectangles(piece):
        assert first < stop
        assert first_key < stop_key
        assert not causal or stop - first == stop_key - first_key
        found += [
            (row, key)
            for row in range(first, stop)
            for key in range(first_key, stop_key)
            if not causal or key - first_key <= row - first
        ]
    return found


def check(queries: Tokens, keys: Tokens, starts: tuple[int, ...], max_rows: int | None) -> None:
    pieces = [tile for piece in visible_pieces(queries, keys, starts) for tile in cut_rows(piece, max_rows)]
    expected = visible_pairs(queries, keys, starts)
    rows = [row for piece in pieces for row in range(*piece.rows)]
    assert rows == sorted({row for row, _ in expected})  # rising, each in one piece, none that sees nothing
    at_queries, at_keys = positions(queries), positions(keys)
    for piece in pieces:
        assert piece.rows[1] - piece.rows[0] <= (max_rows or LENGTH)
        if piece.causal:
            length = piece.rows[1] - piece.rows[0]
            assert at_queries[slice(*piece.rows)] == at_keys[piece.keys[1] - length : piece.keys[1]]
    found = [pair for piece in pieces for pair in pairs_of(piece)]
    assert len(found) == len(set(found))
    assert set(found) == expected
    assert sorted(pair for piece in pieces for pair in pairs_of_calls(piece)) == sorted(found)


max_rows = st.one_of(st.none(), st.integers(1, 12))


@settings(patient, max_examples=200)
@given(intervals(), intervals(), starts, max_rows)
def test_each_visible_pair_is_in_one_piece(
    queries: tuple[Interval, ...], keys: tuple[Interval, ...], starts: tuple[int, ...], max_rows: int | None
) -> None:
    check(Tokens(queries), Tokens(keys), starts, max_rows)


@settings(patient, max_examples=100)
@given(ring_shards(), starts, max_rows)
def test_each_visible_pair_of_a_ring_is_in_one_piece(
    shards: tuple[Tokens, Tokens], starts: tuple[int, ...], max_rows: int | None
) -> None:
    check(*shards, starts, max_rows)


@patient
@given(intervals(), st.integers(0, LENGTH), st.data())
def test_rows_of_tokens(stored: tuple[Interval, ...], position: int, data: st.DataObject) -> None:
    tokens = Tokens(stored)
    every = positions(tokens)
    assert len(tokens) == len(every)
    assert tokens.before(position) == sum(t < position for t in every)
    wanted = data.draw(intervals(len(every)))
    assert positions(tokens.rows(wanted)) == [every[row] for start, stop in wanted for row in range(start, stop)]


def test_few_pieces() -> None:
    whole, early, late = Tokens(((0, 32),)), zigzag_tokens(32, 0, 2), zigzag_tokens(32, 1, 2)  # chunks 0, 3 and 1, 2
    causal = Piece((0, 32), (0, 32), causal=True)
    assert list(visible_pieces(whole, whole)) == [causal]
    assert rectangles(causal) == [((0, 32), (0, 32), True)]
    assert list(visible_pieces(early, early)) == [
        Piece((0, 16), (0, 16), causal=True)
    ]  # on its own keys: as one sequence
    assert list(visible_pieces(late, early)) == [Piece((0, 16), (0, 8), causal=False)]
    assert list(visible_pieces(early, late)) == [Piece((8, 16), (0, 16), causal=False)]
    assert list(visible_pieces(whole, whole, starts=(0, 5, 20))) == [
        Piece((0, 5), (0, 5), causal=True),
        Piece((5, 20), (5, 20), causal=True),
        Piece((20, 32), (20, 32), causal=True),
    ]
    tiles = cut_rows(causal, 20)
    assert tiles == [Piece((0, 20), (0, 20), causal=True), Piece((20, 32), (0, 32), causal=True)]
    assert rectangles(tiles[1]) == [((20, 32), (20, 32), True), ((20, 32), (0, 20), False)]
