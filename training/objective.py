"""What a step minimises: the losses of a batch, on any number of processes.

Each process averages a loss over its own rows. `share_of_global_mean` rescales that average, so that the average over
processes, which data parallelism takes of gradients, is the mean over the global batch: 1, 2 and 8 processes train the
same function, however unequal their rows.

To add a loss: write it in losses.py as a pure function, name it in LOSSES, and give it its lines in `Objective.losses`
and its weight in `Objective.total`. To validate it too, name it in MEASURES and give it its lines in `measures`.
"""

from dataclasses import dataclass

from torch import Tensor

from data.batch import Batch
from losses import distillation_loss, group_ranks, hard_negative_loss, in_batch_loss, over_prefixes
from runtime.collectives import gather

LOSSES = ("in_batch", "hard", "distillation")
MEASURES = ("in_batch", "hard", "group_accuracy", "group_mrr")  # of validation; of a prefix: in_batch@64


@dataclass(frozen=True)
class Objective:
    """F2LLM's in-batch and hard-negative loss; F2LLM-v2's Matryoshka prefixes and distillation.

    Args:
        temperature: divides cosine similarities; a dataset may have its own, and so an objective of its own.
        prefixes: embedding prefix -> weight of its losses, from `matryoshka_weights`; {d: 1.0} for full width alone.
        gather_with_grad: False detaches the gathered positives, as the published code did when launched.
        kd_weight: weight of the distillation loss.
        mask_same_text: leave out in-batch negatives that are the query's own positive, shared with another query.
    """

    temperature: float
    prefixes: dict[int, float]
    gather_with_grad: bool = True
    kd_weight: float = 1.0
    mask_same_text: bool = False

    def gather_candidates(self, batch: Batch, embeddings: Tensor) -> Tensor:
        """The positives of all processes, which each query of a retrieval batch is compared with.

        Collective: every process must call this.

        Args:
            embeddings: [u, d] of the batch's distinct texts.

        Returns:
            [B, d], B the global batch, in the order of the processes.
        """
        _, positives, _ = batch.split(batch.spread(embeddings))  # [b, d]
        if not self.gather_with_grad:
            positives = positives.detach()
        return gather(positives, batch.counts)

    def losses(
        self, batch: Batch, embeddings: Tensor, candidates: Tensor | None, teacher: Tensor | None = None
    ) -> dict[str, Tensor]:
        """This process's part of each loss by name, before `kd_weight`.

        Args:
            embeddings: [u, d] of the batch's distinct texts.
            candidates: [B, d] from `gather_candidates` for retrieval data. None leaves the in-batch loss out: of
                clustering and classification data another query's positive may answer this query just as well
                (training/recipes.py says which datasets have it).
            teacher: [u, D >= d] a teacher's embeddings of the same texts, or None.
        """
        embeddings = batch.spread(embeddings)  # [texts, d]
        queries, positives, negatives = batch.split(embeddings)  # [b, d], [b, d], [b, n, d]
        losses = {}
        if candidates is not None:
            mean = over_prefixes(
                in_batch_loss, self.prefixes, queries, candidates,
                targets=batch.targets, temperature=self.temperature, same=self._same_text(batch),
            )  # fmt: skip
            losses["in_batch"] = share_of_global_mean(mean, batch.rows, sum(batch.counts), batch)
        if negatives.shape[1]:  # with num_hard_neg 0 it would be 0 for any model
            mean = over_prefixes(
                hard_negative_loss, self.prefixes, queries, positives, negatives,
                temperature=self.temperature, mask=batch.mask,
            )  # fmt: skip
            losses["hard"] = share_of_global_mean(mean, batch.rows, sum(batch.counts), batch)
        if teacher is not None:
            losses["distillation"] = distillation(batch, embeddings, batch.spread(teacher))
        return losses

    def gather_and_losses(
        self, batch: Batch, embeddings: Tensor, in_batch: bool, teacher: Tensor | None = None
    ) -> dict[str, Tensor]:
        """`gather_candidates` for data with the in-batch loss, then `losses`."""
        candidates = self.gather_candidates(batch, embeddings) if in_batch else None
        return self.losses(batch, embeddings, candidates, teacher)

    def total(self, losses: dict[str, Tensor], embeddings: Tensor) -> Tensor:
        """The scalar to differentiate: the weighted sum of the losses.

        0 * sum of the embeddings takes a process without rows through the backward pass with the others.
        """
        weights = {"in_batch": 1.0, "hard": 1.0, "distillation": self.kd_weight}
        total = 0.0 * embeddings.sum()
        for name, loss in losses.items():
            total = total + weights[name] * loss
        return total

    def measures(self, batch: Batch, embeddings: Tensor, in_batch: bool) -> dict[str, tuple[Tensor, int]]:
        """Validation of one batch: name -> (mean, over how many rows of this process). Full width, no Matryoshka."""
        queries, positives, negatives = batch.split(batch.spread(embeddings))
        measures = {}
        if negatives.shape[1]:
            hard = hard_negative_loss(queries, positives, negatives, self.temperature, batch.mask)
            measures["hard"] = (hard, batch.rows)
        if in_batch:  # a lone positive has nothing to win against: 0, as published
            candidates = gather(positives, batch.counts)
            loss = in_batch_loss(queries, candidates, batch.targets, self.temperature, self._same_text(batch))
            measures["in_batch"] = (loss, batch.rows)
        has_negative = batch.mask.any(dim=1)  # [b]
        ranks = group_ranks(queries, positives, negatives, batch.mask)[has_negative].double()
        if len(ranks):
            measures["group_accuracy"] = ((ranks == 1).double().mean(), len(ranks))
            measures["group_mrr"] = ((1 / ranks).mean(), len(ranks))
        return measures

    def measures_by_width(self, batch: Batch, embeddings: Tensor, in_batch: bool) -> dict[str, tuple[Tensor, int]]:
        """`measures` at full width, and of each shorter Matryoshka prefix by itself, named as `in_batch@64`.

        Each prefix is normalised anew; nothing is weighted or summed. Collective for data with the in-batch loss.
        """
        measures = {}
        for dim in self.prefixes:
            found = self.measures(batch, embeddings[:, :dim], in_batch)
            measures |= {self._at(kind, dim): value for kind, value in found.items()}
        return measures

    @property
    def measured(self) -> list[str]:
        """Every name that `measures_by_width` may give."""
        return [self._at(kind, dim) for dim in self.prefixes for kind in MEASURES]

    def _at(self, kind: str, dim: int) -> str:
        """The name of a measure of the first `dim` dimensions: `kind` alone where these are all."""
        return kind if dim == max(self.prefixes) else f"{kind}@{dim}"

    def _same_text(self, batch: Batch) -> Tensor | None:
        """[B] text numbers, equal where candidates are the same text; None if those count as negatives."""
        return batch.positives if self.mask_same_text else None


def share_of_global_mean(mean: Tensor, own: int, everywhere: int, batch: Batch) -> Tensor:
    """A mean over `own` items of this process, rescaled: the average over processes is then the mean over all items."""
    return mean * (own * len(batch.counts) / max(everywhere, 1))


def distillation(batch: Batch, embeddings: Tensor, teacher: Tensor) -> Tensor:
    """MSE to the teacher: of queries + of positives + of negatives, each a mean over the global batch.

    Args:
        embeddings: [texts, d] of the tuples' texts: queries | positives | negatives.
        teacher: [texts, D >= d] of the same texts.
    """
    b = batch.rows
    rows = sum(batch.counts)
    total = embeddings.new_zeros(())
    for part, everywhere in (
        (slice(0, b), rows),
        (slice(b, 2 * b), rows),
        (slice(2 * b, len(batch.texts)), batch.negatives),
    ):
        mean = distillation_loss(embeddings[part], teacher[part])
        total = total + share_of_global_mean(mean, part.stop - part.start, everywhere, batch)
    return total
