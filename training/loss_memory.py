"""How much memory the losses of a step need, by their formulas: in fp32, whatever the model computes in.

They grow with the batch and the width and not with the length of the texts: 16,384 tuples of 2,560 numbers with
Matryoshka's prefixes and 7 negatives need 2.4 GB on one of eight processes; the published 512 of 1,024 need 20 MB.

    python -m pytest tests/training/test_loss_memory.py       against the peak that is counted while they run
"""

from dataclasses import dataclass

from losses import BLOCK

NUMBER = 4  # bytes of fp32


@dataclass(frozen=True)
class LossShape:
    """What the memory of a step's losses depends on."""

    tuples: int  # b, of this process
    global_batch: int  # B, of all processes
    negatives: int  # n, of a tuple
    width: int  # d, of an embedding
    prefixes: tuple[int, ...]  # of the embeddings; (d,) without Matryoshka
    retrieval: bool = True  # queries are compared with the positives of all processes
    teacher_width: int = 0  # D, 0 without a teacher

    @property
    def texts(self) -> int:
        """Texts of this process's tuples."""
        return self.tuples * (2 + self.negatives)


def loss_bytes(shape: LossShape) -> int:
    """Bytes at the peak of the losses' forward and backward pass, the embeddings and their gradient included.

    The peak stands where the backward pass begins: everything that was kept is there, and the gradients come. What is
    counted while the losses run is at most this, and at least two thirds of it.
    """
    numbers = _embeddings(shape) + _distillation(shape)
    largest_transient = 0
    for prefix in shape.prefixes:
        for kept, transient in (_in_batch(shape, prefix), _hard_negatives(shape, prefix)):
            numbers += kept
            largest_transient = max(largest_transient, transient)
    return NUMBER * (numbers + largest_transient)


def _embeddings(shape: LossShape) -> int:
    """The distinct texts' embeddings, spread over the tuples, gathered; and the gradients that come first."""
    spread = shape.texts * shape.width  # [texts, d], and [u, d] of the distinct texts at most
    numbers = 3 * spread  # both, and a gradient
    if shape.retrieval and shape.tuples == shape.global_batch:
        numbers += spread  # once more: the positives among them are taken for the others
    if shape.retrieval and shape.tuples < shape.global_batch:
        numbers += 2 * shape.global_batch * shape.width  # [B, d], and its gradient
    if shape.negatives:
        numbers += shape.tuples * shape.negatives * shape.width  # [b, n, d]
    return numbers


def _in_batch(shape: LossShape, prefix: int) -> tuple[int, int]:
    """Numbers that one prefix of the in-batch loss keeps, and those that its backward pass needs for a moment."""
    if not shape.retrieval:
        return 0, 0
    normalised = (shape.tuples + shape.global_batch) * prefix  # [b, p], [B, p]
    logits = shape.tuples * shape.global_batch  # [b, B]
    gradients = 2 * normalised + shape.global_batch * shape.width
    if _in_blocks(shape.tuples, shape.global_batch):
        return normalised, 4 * _block(shape.global_batch) + gradients
    return normalised + logits, 2 * logits + gradients


def _hard_negatives(shape: LossShape, prefix: int) -> tuple[int, int]:
    """What `_in_batch` gives, for the hard-negative loss."""
    if not shape.negatives:
        return 0, 0
    per_tuple = (1 + shape.negatives) * prefix
    group = shape.tuples * per_tuple  # [b, 1 + n, p]
    gradients = shape.tuples * (1 + shape.negatives) * shape.width
    if _in_blocks(shape.tuples, per_tuple):
        return 0, 5 * _block(per_tuple) + gradients
    return 2 * group, 3 * group + gradients


def _distillation(shape: LossShape) -> int:
    """The teacher's embeddings as they come and spread, and the differences."""
    if not shape.teacher_width:
        return 0
    return shape.texts * (2 * shape.teacher_width + shape.width)


def _in_blocks(rows: int, numbers_per_row: int) -> bool:
    """Whether losses.py computes so many rows in blocks, and keeps only their inputs."""
    return rows > _rows_of_block(numbers_per_row)


def _block(numbers_per_row: int) -> int:
    """Numbers in a block of rows."""
    return _rows_of_block(numbers_per_row) * numbers_per_row


def _rows_of_block(numbers_per_row: int) -> int:
    return max(1, BLOCK // max(numbers_per_row, 1))
