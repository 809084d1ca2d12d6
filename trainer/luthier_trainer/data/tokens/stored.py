"""Record batches as `conversion` makes them, seen as the examples that are trained on."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa


@dataclass(frozen=True, slots=True, eq=False)
class StoredExample:
    """What is trained on as one sequence. input_ids: int32 [tokens]; trained: bool [tokens], the tokens that the loss
    counts as targets (but the first, which nothing predicts)."""

    input_ids: npt.NDArray[np.int32]
    trained: npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Chunk:
    """The rows of one record batch, as views of its memory; row i has tokens offsets[i] to offsets[i + 1], and
    examples of the lengths pieces[piece_offsets[i]] to pieces[piece_offsets[i + 1]]."""

    offsets: npt.NDArray[np.int32]
    input_ids: npt.NDArray[np.int32]
    trained: npt.NDArray[np.bool_]
    piece_offsets: npt.NDArray[np.int32]
    pieces: npt.NDArray[np.int32]

    def examples(self, row: int) -> list[StoredExample]:
        """What a row of the batch is trained on, as arrays of its own."""
        found: list[StoredExample] = []
        start = int(self.offsets[row])
        for length in self.pieces[self.piece_offsets[row] : self.piece_offsets[row + 1]].tolist():
            end = start + length
            found.append(StoredExample(self.input_ids[start:end].copy(), self.trained[start:end].copy()))
            start = end
        return found


def chunk_of(batch: pa.RecordBatch) -> Chunk:
    """The batch's columns without a copy."""
    ids, trained, pieces = (batch.column(name) for name in ("input_ids", "trained", "pieces"))
    return Chunk(
        ids.offsets.to_numpy(),
        ids.values.to_numpy(),
        trained.values.to_numpy().view(np.bool_),
        pieces.offsets.to_numpy(),
        pieces.values.to_numpy(),
    )


def lengths_and_scored(chunks: tuple[Chunk, ...]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Tokens of each row's longest example, and trained tokens of each row without those that begin an example."""
    lengths = [np.zeros(0, np.int64)]
    scored = [np.zeros(0, np.int64)]
    for chunk in chunks:
        rows = len(chunk.offsets) - 1
        owners = np.repeat(np.arange(rows), np.diff(chunk.piece_offsets))
        ends = np.cumsum(chunk.pieces, dtype=np.int64)
        starts = ends - chunk.pieces
        trained = np.concatenate([np.zeros(1, np.int64), np.cumsum(chunk.trained, dtype=np.int64)])
        longest = np.zeros(rows, np.int64)
        np.maximum.at(longest, owners, chunk.pieces.astype(np.int64))
        targets = trained[ends] - trained[np.minimum(starts + 1, ends)]
        lengths.append(longest)
        scored.append(np.bincount(owners, targets, minlength=rows).astype(np.int64))
    return np.concatenate(lengths), np.concatenate(scored)
