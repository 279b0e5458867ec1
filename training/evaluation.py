"""Search in retrieval sets with the model in training, shared out over the processes, under every engine.

The texts of a set are cut into chunks, which depend on the set alone. Each of n processes tokenises and embeds every
n-th chunk, without padding: queries with the instruction that the saved folder will put before them, documents as they
are. Then every process gets the vectors of all queries, and finds the best documents in its own chunks; the main
process merges these and scores the rankings. Which texts are embedded together does not depend on the number of
processes, so the rankings do not either.

Nothing here draws a random number, and no vector of a document is kept: memory grows with queries, not with documents.
"""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from modeling.prompts import carries_instruction, query_prompt
from modeling.tokenizer import make_encoder
from retrieval import metrics
from retrieval.beir import RetrievalSet
from retrieval.encode import TOKENS, batches_by_tokens, pack
from retrieval.metrics import DEPTH
from retrieval.search import Nearest, Ranking, merge
from retrieval.vectors import shard_size
from runtime import engine
from runtime.collectives import all_rows, largest_of_all, sum_of_all
from runtime.resume import from_main
from training.best import Results
from training.console import format_evaluation
from training.records import evaluation_tags
from training.setup import Run
from utils import hide_bar_unless


def evaluate(run: Run, step: int) -> bool:
    """Search in the retrieval sets, where it is time to. Returns whether the model is the best so far."""
    evaluations = run.evaluations
    if not evaluations.is_due(step, run.schedule.steps):
        return False
    encode = make_encoder(run.tokenizer, run.args.max_seq_length)
    searcher = Searcher(
        run.accelerator, run.model, encode, run.query_instruction, evaluations.dims, run.feed.max_tokens_per_forward
    )
    with run.meter.paused():
        run.model.eval()
        results = from_main(run.accelerator, searcher.evaluate(evaluations.sets))
        run.model.train()
        is_best = evaluations.note(step, results)
        run.metrics.write(step, "evaluation", {"sets": results}, evaluation_tags(results))
    if run.accelerator.is_main_process:
        tqdm.write(f"step {step}/{run.schedule.steps} | {format_evaluation(results, evaluations.best)}")
    return is_best


class Searcher:
    """One process's part of an evaluation. All processes call it alike.

    Args:
        accelerator: that has the model.
        model: as the engine holds it, in eval mode.
        encode: texts -> (ids of all texts end to end, tokens of each, which were cut), as tokenising does.
        instruction: before queries that carry none; "" = none.
        dims: ascending, the whole width last.
        max_tokens_per_forward: or one text; 0 = TOKENS.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        encode,
        instruction: str,
        dims: list[int],
        max_tokens_per_forward: int = 0,
    ):
        self.device = accelerator.device
        self.rank = accelerator.process_index
        self.world = accelerator.num_processes
        self.forward_is_collective = engine.is_sharded(accelerator) or engine.is_deepspeed(accelerator)
        self.model = model
        self.encode = encode
        self.prompt = query_prompt(instruction)
        self.dims = dims
        self.max_tokens_per_forward = min(max_tokens_per_forward or TOKENS, TOKENS)

    @torch.no_grad()
    def evaluate(self, sets: list[RetrievalSet]) -> Results:
        """Set -> dimensions -> metric -> value; of other processes than the first, nothing."""
        total = sum(len(retrieval_set.queries) + len(retrieval_set.documents) for retrieval_set in sets)
        results: Results = {}
        hidden = hide_bar_unless(self.rank == 0)
        with tqdm(total=total, desc="evaluating", unit="text", disable=hidden, leave=False) as bar:
            for retrieval_set in sets:
                by_dim = {}
                for dim, ranking in self._search(retrieval_set, bar).items():
                    by_dim[str(dim)] = metrics.evaluate(ranking.passages, retrieval_set.relevance)
                if by_dim:
                    results[retrieval_set.name] = by_dim
        return results

    def _search(self, retrieval_set: RetrievalSet, bar: tqdm) -> dict[int, Ranking]:
        """Dimensions -> the best documents of each query; of other processes than the first, nothing."""
        queries = self._embed_queries(retrieval_set.queries, bar)  # [n, d]
        k = min(DEPTH, len(retrieval_set.documents))
        nearest = {dim: Nearest(F.normalize(queries[:, :dim], dim=-1), k) for dim in self.dims}
        for own in self._rounds(len(retrieval_set.documents), bar):
            vectors = self._embed(retrieval_set.documents[own])  # [b, d]
            for dim in self.dims:
                nearest[dim].add(F.normalize(vectors[:, :dim], dim=-1), own.start)
        rankings = {}
        for dim in self.dims:
            found = self._of_all_processes(nearest[dim], k)
            if self.rank == 0:
                rankings[dim] = merge(found, k)
        return rankings

    def _rounds(self, count: int, bar: tqdm) -> Iterator[slice]:
        """The chunks of this process, one a round; the last may be empty, since all processes have as many rounds."""
        size = shard_size(count)
        for begin in range(0, count, size * self.world):
            own = min(begin + self.rank * size, count)
            yield slice(own, min(own + size, count))
            bar.update(min(size * self.world, count - begin))

    def _embed_queries(self, texts: list[str], bar: tqdm) -> Tensor:
        """All queries on every process, [n, d]."""
        texts = [text if carries_instruction(text) else self.prompt + text for text in texts]
        vectors = torch.zeros(len(texts), self.dims[-1], device=self.device)
        for own in self._rounds(len(texts), bar):
            vectors[own] = self._embed(texts[own])
        return sum_of_all(vectors, self.world)  # each row is zero on all processes but one

    def _embed(self, texts: list[str]) -> Tensor:
        """[n, d] fp32, not normalised."""
        batches = []
        if texts:
            tokens, lengths, _ = self.encode(texts)  # [T], [n]
            batches = list(batches_by_tokens(lengths, self.max_tokens_per_forward))
        spare_passes = self._passes_of_all(len(batches)) - len(batches)
        vectors = torch.zeros(len(texts), self.dims[-1], device=self.device)
        for batch in batches:
            states = self.model(*pack(tokens, lengths, batch, self.device))  # [b, d]
            vectors[torch.from_numpy(batch).to(self.device)] = states.float()
        for _ in range(spare_passes):  # with one token, to take part in collectives
            self.model(*pack(np.zeros(1, np.int32), np.ones(1, np.int64), np.zeros(1, np.int64), self.device))
        return vectors

    def _passes_of_all(self, own: int) -> int:
        """How often each process must call the model in this round, when this one has `own` batches."""
        return largest_of_all(own, self.world, self.device) if self.forward_is_collective else own

    def _of_all_processes(self, nearest: Nearest, k: int) -> list[Ranking]:
        """What each process found, k documents for each query; where one had fewer, with scores of -inf."""
        numbers, scores = nearest.found()  # [n, at most k] both
        missing = k - numbers.shape[1]
        numbers = all_rows(F.pad(numbers, (0, missing)), self.world).cpu().numpy()  # [processes, n, k]
        scores = all_rows(F.pad(scores, (0, missing), value=-torch.inf), self.world).cpu().numpy()
        return [Ranking(*both) for both in zip(numbers, scores, strict=True)]
