"""What a step minimises: the losses of a batch, on any number of processes.

Each process has the mean of a loss over its own rows. `share` makes of it the process's part of the mean over the
global batch, such that the average over processes, which data parallelism takes of gradients, is the one-process
value and gradient: 1, 2 and 8 processes train the same function, however unequal their rows.
"""

from dataclasses import dataclass

from torch import Tensor

from data.batch import Batch
from losses import distillation_loss, group_ranks, hard_negative_loss, in_batch_loss, over_prefixes
from utils import gather

LOSSES = ("in_batch", "hard", "distillation")
MEASURES = ("in_batch", "hard", "group_accuracy", "group_mrr")


@dataclass(frozen=True)
class Objective:
    """F2LLM's in-batch and hard-negative loss; F2LLM-v2's Matryoshka prefixes and distillation.

    Args:
        temperature: divides cosine similarities.
        prefixes: embedding prefix -> weight of its losses, from `matryoshka_weights`; {d: 1.0} for full width alone.
        gather_with_grad: False keeps the in-batch gradient from the positives, as the published code when launched.
        kd_weight: weight of the distillation loss.
        mask_same_text: leave out in-batch negatives that are the query's own positive, shared with another query.
    """

    temperature: float
    prefixes: dict[int, float]
    gather_with_grad: bool = True
    kd_weight: float = 1.0
    mask_same_text: bool = False

    def terms(
        self, batch: Batch, embeddings: Tensor, retrieval: bool, taught: Tensor | None = None
    ) -> dict[str, Tensor]:
        """This process's part of each loss by name, before `kd_weight`.

        Args:
            embeddings: [u, d] of the batch's distinct texts.
            retrieval: in-batch negatives make sense: other queries' positives answer this query only by accident.
            taught: [u, D >= d] the teacher's embeddings of the same texts.
        """
        embeddings = batch.spread(embeddings)  # [texts, d]
        queries, positives, negatives = batch.split(embeddings)  # [b, d], [b, d], [b, n, d]
        means, common = {}, {"temperature": self.temperature}
        if retrieval:
            candidates = gather(positives if self.gather_with_grad else positives.detach(), batch.counts)  # [B, d]
            rest = common | {"targets": batch.targets, "same": self._same(batch)}
            means["in_batch"] = over_prefixes(in_batch_loss, self.prefixes, queries, candidates, **rest)
        triples = (queries, positives, negatives)
        means["hard"] = over_prefixes(hard_negative_loss, self.prefixes, *triples, mask=batch.mask, **common)
        terms = {kind: share(mean, batch.rows, sum(batch.counts), batch) for kind, mean in means.items()}
        if taught is not None:
            terms["distillation"] = distillation(batch, embeddings, batch.spread(taught))
        return terms

    def total(self, terms: dict[str, Tensor], embeddings: Tensor) -> Tensor:
        """The scalar to differentiate. 0 * sum takes a process without rows through the backward pass with others."""
        weights = {"distillation": self.kd_weight}
        return sum(weights.get(kind, 1.0) * term for kind, term in terms.items()) + 0.0 * embeddings.sum()

    def _same(self, batch: Batch) -> Tensor | None:
        return batch.positives if self.mask_same_text else None

    def measures(self, batch: Batch, embeddings: Tensor, retrieval: bool) -> dict[str, tuple[Tensor, int]]:
        """Validation of one batch: name -> (mean, over how many rows of this process). Full width, no Matryoshka."""
        queries, positives, negatives = batch.split(batch.spread(embeddings))
        hard = hard_negative_loss(queries, positives, negatives, self.temperature, batch.mask)
        found = {"hard": (hard, batch.rows)}
        if retrieval and sum(batch.counts) > 1:  # alone, a positive has nothing to win against
            candidates = gather(positives, batch.counts)
            loss = in_batch_loss(queries, candidates, batch.targets, self.temperature, self._same(batch))
            found["in_batch"] = (loss, batch.rows)
        grouped = batch.mask.any(dim=1)  # rows with a negative at all
        ranks = group_ranks(queries, positives, negatives, batch.mask)[grouped].double()
        if len(ranks):
            found["group_accuracy"] = ((ranks == 1).double().mean(), len(ranks))
            found["group_mrr"] = ((1 / ranks).mean(), len(ranks))
        return found


def share(mean: Tensor, mine: int, everywhere: int, batch: Batch) -> Tensor:
    """A mean over `mine` items of this process as its part of the mean over the items of all: see the module."""
    return mean * (mine * len(batch.counts) / max(everywhere, 1))


def distillation(batch: Batch, embeddings: Tensor, taught: Tensor) -> Tensor:
    """MSE to the teacher: of queries + of positives + of negatives, each a mean over the global batch."""
    b, texts, rows = batch.rows, len(batch.texts), sum(batch.counts)
    parts = ((slice(0, b), rows), (slice(b, 2 * b), rows), (slice(2 * b, texts), batch.negatives))
    return sum(
        share(distillation_loss(embeddings[part], taught[part]), part.stop - part.start, everywhere, batch)
        for part, everywhere in parts
    )
