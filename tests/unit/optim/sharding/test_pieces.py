"""What a local shard and a logical matrix have in common, by hand."""

from typing import Any

import torch

from earthshine.optim.logical_matrices import LogicalMatrix
from earthshine.optim.ranges import Ranges
from earthshine.optim.sharding.pieces import Piece, num_common, pieces_of


def listed(matrix: LogicalMatrix, rows: Ranges, cols: Ranges) -> tuple[Any, ...]:
    pieces = pieces_of(5, matrix, rows, cols)
    assert all(p.param == 5 and p.matrix == (matrix.M, matrix.N) and p.count == 1 for p in pieces)
    assert sum(p.numel for p in pieces) == num_common(matrix, rows, cols)
    return tuple((p.local, p.in_matrix, p.size, p.step) for p in pieces)


def test_pieces_by_hand() -> None:
    """Key rows of an interleaved qkv, and a holder of rows 2 to 9 and the right half of the columns."""
    matrix = LogicalMatrix(((1, 3), (5, 7), (9, 11)), (0, 6))
    assert listed(matrix, ((2, 10),), ((3, 6),)) == (
        ((0, 0), (1, 3), (1, 3), 1),
        ((3, 0), (2, 3), (2, 3), 1),
        ((7, 0), (4, 3), (1, 3), 1),
    )
    assert listed(matrix, (), ((3, 6),)) == ()
    assert listed(matrix, ((3, 5),), ((3, 6),)) == ()
    assert listed(matrix, ((0, 20),), ((6, 9),)) == ()
    every_third = LogicalMatrix(((0, 2),), (1, 12), 3)  # columns 1, 4, 7, 10
    assert listed(every_third, ((0, 2),), ((2, 5), (6, 12))) == (
        ((0, 2), (0, 1), (2, 1), 3),
        ((0, 4), (0, 2), (2, 2), 3),
    )
    assert listed(every_third, ((0, 2),), ((2, 4),)) == ()


def test_a_piece_is_the_same_memory_in_shard_and_batch() -> None:
    """Every second column of rows 1 to 2 of a shard: rows 3 and 4, columns 0 and 1 of a tall matrix [6, 2]."""
    piece = Piece(0, (6, 2), (1, 1), (3, 0), (2, 2), step=2)
    shard = torch.arange(16.0).view(4, 4)
    X_BSL = torch.zeros(3, 2, 6)
    piece.in_batch(X_BSL, 1).copy_(piece.of({0: shard}))
    assert X_BSL[1].mT[3:5].tolist() == [[5, 7], [9, 11]]
    assert X_BSL.count_nonzero() == 4
    piece.of({0: shard}).zero_()
    assert shard.count_nonzero() == 11
    rows_BL = torch.zeros(3, 6)
    piece.rows_in_batch(rows_BL, 1).copy_(piece.rows_of({0: torch.arange(4.0).view(4, 1)}))
    assert rows_BL[1].tolist() == [0, 0, 0, 1, 2, 0]
