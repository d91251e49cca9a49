"""Pieces: the rectangles that a process's local shard and a logical matrix have in common. All that fills a batch, and
all that travels, is pieces.

Legend: M rows and N columns of a matrix; C matrices, R rows and K columns of a piece; B, S, L as in `sharding.batches`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from earthshine.optim.logical_matrices import LogicalMatrix
from earthshine.optim.ranges import Ranges, overlap, overlaps
from earthshine.optim.rounding import Noise


@dataclass(frozen=True)
class Piece:
    """A rectangle of `size` (rows, columns).

    param: the parameter's index in its group. matrix: rows and columns of the whole logical matrix.
    local, in_matrix: where its first row and column are, in the 2-D view of the local shard and in the matrix.
    step: from each of its columns to the next in the local shard.
    count: how many of these lie one below the other in the local shard, each a whole matrix of its own, or 1.
    """

    param: int
    matrix: tuple[int, int]
    local: tuple[int, int]
    in_matrix: tuple[int, int]
    size: tuple[int, int]
    step: int = 1
    count: int = 1

    @property
    def numel(self) -> int:
        return self.count * self.size[0] * self.size[1]

    def of(self, views: Mapping[int, Tensor]) -> Tensor:
        """[C, R, K] of the parameters' local shards, the same memory."""
        (rows, cols), view = self.size, views[self.param]
        height = self.count * rows
        if view.shape != (height, cols):
            row, col = self.local
            view = view[row : row + height, col : col + (cols - 1) * self.step + 1 : self.step]
        return view.view(self.count, rows, cols)

    def rows_of(self, views: Mapping[int, Tensor]) -> Tensor:
        """[C, R] of local shards with one value per row, the same memory."""
        rows = self.size[0]
        return views[self.param].narrow(0, self.local[0], self.count * rows).view(self.count, rows)

    def noise(self, noises: Mapping[int, Noise]) -> Noise | None:
        """How these elements of a weight are rounded; None where that is to nearest."""
        noise = noises.get(self.param)
        return noise and noise.part(*self.local, self.count * self.size[0], self.size[1])

    def in_batch(self, X_BSL: Tensor, slot: int) -> Tensor:
        """[C, R, K] of the batch's matrices from `slot` on, the same memory."""
        M, N = self.matrix
        X_CMN = X_BSL.narrow(0, slot, self.count)
        X_CMN = X_CMN.mT if M > N else X_CMN
        if self.size == self.matrix:
            return X_CMN
        return X_CMN.narrow(1, self.in_matrix[0], self.size[0]).narrow(2, self.in_matrix[1], self.size[1])

    def rows_in_batch(self, values_BL: Tensor, slot: int) -> Tensor:
        """[C, R] of one value per row of the batch's matrices, the same memory."""
        return values_BL.narrow(0, slot, self.count).narrow(1, self.in_matrix[0], self.size[0])


def pieces_of(param: int, matrix: LogicalMatrix, rows: Ranges, cols: Ranges) -> tuple[Piece, ...]:
    """What a holder of these rows and columns of the view has of a matrix, ordered by row and column; maybe ()."""
    across = list(_common_cols(cols, matrix))
    shape = matrix.M, matrix.N
    return tuple(
        Piece(param, shape, (local_row, local_col), (row, col), (height, width), matrix.step)
        for local_row, row, height in overlaps(rows, matrix.rows)
        for local_col, col, width in across
    )


def num_common(matrix: LogicalMatrix, rows: Ranges, cols: Ranges) -> int:
    """How many elements the pieces have together."""
    width = sum(n for *_, n in _common_cols(cols, matrix)) if matrix.step > 1 else overlap(cols, (matrix.cols,))
    return width * overlap(rows, matrix.rows) if width else 0


def _common_cols(held: Ranges, matrix: LogicalMatrix) -> Iterator[tuple[int, int, int]]:
    """(offset among the held columns, offset among the matrix's, number) of each range that is in both."""
    if matrix.step == 1:
        yield from overlaps(held, (matrix.cols,))
        return
    wanted, before = range(*matrix.cols, matrix.step), 0
    for start, stop in held:
        first, last = (max(0, -((wanted.start - edge) // matrix.step)) for edge in (start, stop))
        if first < min(last, len(wanted)):
            yield before + wanted[first] - start, first, min(last, len(wanted)) - first
        before += stop - start
