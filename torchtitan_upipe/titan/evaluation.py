"""Evaluation of a long context in the layout that a job trains with: needles, losses, and what they write."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from itertools import groupby, product
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import JobConfig
from torchtitan.tools.logging import logger

from torchtitan_upipe.data.needles import Cell, Needles, sentence_ends
from torchtitan_upipe.data.scored import Scored, by_position, longest_first
from torchtitan_upipe.job import evaluation as settings
from torchtitan_upipe.job.results import ContextGain, NeedleResult, PositionLoss, Results, results_path
from torchtitan_upipe.titan.datasets import read_documents
from torchtitan_upipe.titan.evaluation_report import print_tables, scalars
from torchtitan_upipe.titan.scores import Scorer

SPARE = 2  # times as many tokens are read as sequences take, for longer documents to be among them
PATIENCE = 10.0  # seconds between lines about progress


class Evaluator:
    """Evaluates a job's model, the same way at every step.

    All ranks read the same text and make the same prompts, whatever their number, before training begins.

    Args:
        config: the job.
        tokenizer: its own.
        scorer: scores sequences.
        metrics: where scalars are logged, and the clock of training, which stands still meanwhile.

    Raises:
        ValueError: the text is too short, or a prompt too long.
    """

    def __init__(self, config: JobConfig, tokenizer: BaseTokenizer, scorer: Scorer, metrics: MetricsProcessor) -> None:
        self.config = config
        self.scorer = scorer
        self.metrics = metrics
        self._last: int | None = None
        evaluation = config.evaluation
        needle_lengths = settings.needle_lengths(config) if evaluation.needle_trials else []
        loss_lengths = settings.loss_lengths(config) if evaluation.loss_sequences else []
        needed = max([*needle_lengths, *(SPARE * evaluation.loss_sequences * (n + 1) for n in loss_lengths)])
        source, documents = _first_documents(config, tokenizer, needed)
        self.cells = [
            Cell(*kind) for kind in product(needle_lengths, sorted(evaluation.needle_depths), evaluation.needle_keys)
        ]
        self.needles = _needles(config, tokenizer, source, documents, max(needle_lengths)) if self.cells else None
        for cell in self.cells:
            if cell.length == needle_lengths[0]:
                self._prompts(cell)  # the shortest prompts have the least room
        self.texts = {n: _sequences(source, documents, n, evaluation.loss_sequences) for n in loss_lengths}

    def due(self, step: int) -> bool:
        """Whether ``step``, just trained or loaded from a checkpoint, is to be evaluated. The same on all ranks."""
        first, self._last = self._last is None, step
        if step == 0 or (step % self.config.evaluation.freq and step != self.config.training.steps):
            return False
        if not first:
            return True
        done = [results_path(self.config, step).exists()]  # a run that was ended may have left it to this one
        if dist.is_initialized():
            dist.broadcast_object_list(done)
        return not done[0]

    def run(self, model: nn.Module, step: int) -> Results:
        """Evaluate, write, log and print; return what was found, the same on all ranks."""
        began = time.perf_counter()
        training = model.training
        model.eval()
        progress = Progress(sum(self._tokens()))
        needles = list(self._run_needles(model, progress))
        by_length = {n: self._score(model, sequences, progress) for n, sequences in reversed(self.texts.items())}
        gain = self._gain(model, by_length, progress) if by_length else None
        model.train(training)
        results = Results(
            step=step,
            seq_len=self.config.training.seq_len,
            needles=needles,
            loss_by_position=self._losses_by_position(by_length),
            loss_at={str(n): _mean_loss(by_length[n]) for n in self.texts},
            context_gain=gain,
        )
        self._report(results)
        self.metrics.time_last_log += time.perf_counter() - began
        return results

    def _prompts(self, cell: Cell) -> list[Scored]:
        assert self.needles is not None
        return [self.needles.prompt(cell, trial) for trial in range(self.config.evaluation.needle_trials)]

    def _tokens(self) -> Iterator[int]:
        """Tokens of every sequence that a run scores."""
        for cell in self.cells:
            yield cell.length * self.config.evaluation.needle_trials
        for length, sequences in self.texts.items():
            yield length * len(sequences)
        yield settings.truncated_context(self.config) * len(self._reaching())

    def _run_needles(self, model: nn.Module, progress: Progress) -> Iterator[NeedleResult]:
        trials = self.config.evaluation.needle_trials
        for _, same_length in groupby(self.cells, key=lambda cell: cell.length):
            cells = list(same_length)
            scores = self._score(model, (p for cell in cells for p in self._prompts(cell)), progress)
            for number, cell in enumerate(cells):
                of_cell = scores[number * trials : (number + 1) * trials]
                yield NeedleResult(
                    length=cell.length,
                    depth=cell.depth,
                    keys=cell.keys,
                    trials=trials,
                    exact_match=sum(bool(hits.all()) for _, hits in of_cell) / trials,
                    log_probability=sum(float(log_p.double().sum()) for log_p, _ in of_cell) / trials,
                )

    def _score(
        self, model: nn.Module, sequences: Iterator[Scored] | Sequence[Scored], progress: Progress
    ) -> list[Tensor]:
        """Scores ``[2, n]`` of sequences of one length."""
        scores: list[Tensor] = []
        waiting: list[Scored] = []
        for sequence in sequences:
            waiting.append(sequence)
            if len(waiting) == self.scorer.batch_size(len(sequence.inputs)):
                scores += self.scorer(model, waiting)
                progress.add(sum(len(s.inputs) for s in waiting))
                waiting = []
        if waiting:
            scores += self.scorer(model, waiting)
            progress.add(sum(len(s.inputs) for s in waiting))
        return scores

    def _losses_by_position(self, scores: dict[int, list[Tensor]]) -> list[PositionLoss]:
        if not scores:
            return []
        length = self.config.training.seq_len
        positions = torch.cat([sequence.positions()[sequence.scored] for sequence in self.texts[length]])
        losses = torch.cat([-log_p for log_p, _ in scores[length]])
        return [
            cast(PositionLoss, {"from": low, "to": high, "tokens": tokens, "loss": loss})
            for low, high, tokens, loss in by_position(positions, losses)
        ]

    def _reaching(self) -> list[int]:
        """Which of the longest sequences end with a document that the truncated context cuts."""
        context = settings.truncated_context(self.config)
        sequences = self.texts.get(self.config.training.seq_len, [])
        return [i for i, sequence in enumerate(sequences) if not sequence.starts[-context:].any()]

    def _gain(self, model: nn.Module, scores: dict[int, list[Tensor]], progress: Progress) -> ContextGain | None:
        length, context = self.config.training.seq_len, settings.truncated_context(self.config)
        rows, reaching = context // 2, self._reaching()
        if not reaching:
            return None
        sequences = self.texts[length]
        truncated = self._score(model, [sequences[i].last(context, rows) for i in reaching], progress)
        counts = [of_sequence.shape[1] for of_sequence in truncated]
        whole = _mean_loss([scores[length][i][:, -n:] for i, n in zip(reaching, counts, strict=True)])
        less, tokens = _mean_loss(truncated), sum(counts)
        return ContextGain(truncated_context=context, tokens=tokens, full=whole, truncated=less, gain=less - whole)

    def _report(self, results: Results) -> None:
        self.metrics.logger.log(scalars(results), results.step)
        if dist.is_initialized() and dist.get_rank():
            return
        path = results_path(self.config, results.step)
        results.write(path)
        print_tables(results)
        written = [path]
        if self.config.evaluation.plots:
            from torchtitan_upipe.titan.evaluation_plots import plot_results  # matplotlib is optional

            written += plot_results(results, path)
        logger.info(f"Wrote the evaluation of step {results.step}: {', '.join(map(str, written))}")


class Progress:
    """Says now and then how far an evaluation is.

    Args:
        total: tokens to score.
    """

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self.began = self.said = time.monotonic()

    def add(self, tokens: int) -> None:
        """``tokens`` more are done."""
        self.done += tokens
        now = time.monotonic()
        if now - self.said >= PATIENCE:
            left = (now - self.began) * (self.total - self.done) / self.done
            self.said = now
            logger.info(
                f"Evaluation: {self.done:,} of {self.total:,} tokens ({self.done / self.total:.0%}), "
                f"about {timedelta(seconds=round(left))} left"
            )


def _first_documents(config: JobConfig, tokenizer: BaseTokenizer, tokens: int) -> tuple[str, list[Tensor]]:
    """The name of the text, and its first documents of at least so many tokens of text, if there are as many."""
    source, documents = read_documents(settings.text_section(config), config, tokenizer)
    taken: list[Tensor] = []
    read = 0
    for document in documents:
        taken.append(torch.tensor(document, dtype=torch.int32))
        read += max(len(document) - 2, 1)  # without what begins and ends it
        if read >= tokens:
            break
    return source, taken


def _needles(
    config: JobConfig, tokenizer: BaseTokenizer, source: str, documents: Sequence[Tensor], longest: int
) -> Needles:
    evaluation = config.evaluation
    begin = getattr(tokenizer, "bos_id", None)
    ends = [token for token in (begin, getattr(tokenizer, "eos_id", None)) if token is not None]
    text = torch.cat(list(documents))
    text = text[~torch.isin(text, torch.tensor(ends, dtype=text.dtype))].long()[:longest]
    if len(text) < longest:
        raise ValueError(
            f"evaluation.needle_lengths holds {longest}, and {source} has {len(text)} tokens; name more text in "
            "evaluation.dataset and dataset_path, or shorter lengths."
        )

    def encode(part: str) -> list[int]:  # a tokenizer of Hugging Face's may add tokens that were not asked for
        return [token for token in tokenizer.encode(part, add_bos=False, add_eos=False) if token not in ends]

    return Needles(
        encode,
        text,
        sentence_ends(text, tokenizer.decode),
        [token for token in tokenizer.encode("", add_bos=True, add_eos=False) if token == begin],
        needle=evaluation.needle,
        question=evaluation.question,
        names=settings.needle_names(config),
        values=settings.needle_values(config),
        seed=evaluation.seed,
    )


def _sequences(source: str, documents: Sequence[Tensor], length: int, count: int) -> list[Scored]:
    """Sequences of ``length`` tokens of the first documents, the same whatever other lengths there are."""
    wanted = SPARE * count * (length + 1)
    ends = torch.tensor([len(document) for document in documents]).cumsum(0)
    first = int((ends < wanted).sum()) + 1
    made = longest_first(documents[:first], length, count)
    if len(made) < count:
        raise ValueError(
            f"evaluation.loss_sequences = {count}, and {source} fills {len(made)} of {length} tokens; name more text "
            "in evaluation.dataset and dataset_path, or fewer sequences."
        )
    return made


def _mean_loss(scores: Sequence[Tensor]) -> float:
    """Mean loss of the tokens of ``scores``, each ``[2, n]``."""
    return float(-torch.cat([log_p for log_p, _ in scores]).double().mean())
