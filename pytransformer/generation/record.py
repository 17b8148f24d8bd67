"""What one call has generated so far, on the host: each sequence's new tokens and text, and why it stopped."""

from __future__ import annotations

import torch
from torch import Tensor

from .results import Generation, Step
from .stopping import NewText


class Record:
    """The new tokens of each sequence, and what ends it.

    Args:
        rows: the prompts, int64 or int32 (seqlen).
        max_new_tokens: of each sequence.
        max_seqlen: the most tokens of a sequence, its prompt's included.

    Attributes:
        form, padding: of the result: "one", "batch" or "list", and the token that fills up sequences that ended early.
        ends: tokens that end a sequence, with the reason.
        texts: per sequence, where there is a tokenizer.
        log_probabilities: per sequence and new token, where they were asked for.
    """

    def __init__(self, rows: list[Tensor], max_new_tokens: int, max_seqlen: int) -> None:
        self.rows = rows
        self.prompt_lengths = [len(row) for row in rows]
        self.new_tokens: list[list[int]] = [[] for _ in rows]
        self.stop_reasons: list[str | None] = [None] * len(rows)
        self.form, self.padding = "batch", 0
        self.ends: dict[int, str] = {}
        self.texts: list[NewText] | None = None
        self.log_probabilities: list[list[float]] | None = None
        # The most tokens each sequence may get, and what it will have run into then.
        self.limits = []
        for length in self.prompt_lengths:
            room = max_seqlen - length
            self.limits.append((max_new_tokens, "length") if max_new_tokens <= room else (room, "context"))
        for index, (limit, reason) in enumerate(self.limits):
            if limit == 0:
                self.stop_reasons[index] = reason

    @property
    def finished(self) -> bool:
        """Whether every sequence has ended."""
        return all(reason is not None for reason in self.stop_reasons)

    def record(self, chosen: list[int | None], logits: Tensor, values: list[float | None] | None) -> Step:
        """Takes in a step's tokens and their log-probabilities, and finds which sequences end with them."""
        texts = None if self.texts is None else [""] * len(chosen)
        for index, token in enumerate(chosen):
            if self.stop_reasons[index] is not None:
                chosen[index] = None
                if values is not None:
                    values[index] = None
                continue
            assert token is not None
            text = self.take(index, token, None if values is None else values[index])
            if texts is not None:
                texts[index] = text
        index = max(len(new) for new in self.new_tokens) - 1
        return Step(index, chosen, logits, list(self.stop_reasons), values, texts)

    def take(self, index: int, token: int, value: float | None) -> str:
        """Takes in a token of one sequence, and its log-probability; finds whether the sequence ends with it. The text known since."""
        new = self.new_tokens[index]
        new.append(token)
        limit, limit_reason = self.limits[index]
        reason = self.ends.get(token) or (limit_reason if len(new) == limit else None)
        if value is not None and self.log_probabilities is not None:
            self.log_probabilities[index].append(value)
        known = ""
        if self.texts is not None:
            text = self.texts[index]
            known = text.push(token)
            if text.is_stopped:
                reason = "stop"
            elif reason is not None:
                known += text.finish()
        self.stop_reasons[index] = reason
        return known

    def result(self) -> Generation:
        """All of it, in the form of the prompts."""
        sequences = [
            torch.cat([row, torch.tensor(new, dtype=row.dtype, device=row.device)])
            for row, new in zip(self.rows, self.new_tokens)
        ]
        token_ids: Tensor | list[Tensor] = sequences
        if self.form != "list":
            token_ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=self.padding)
            if self.form == "one":
                token_ids = token_ids[0]
        reasons = [reason for reason in self.stop_reasons if reason is not None]
        texts = None if self.texts is None else [text.text for text in self.texts]
        counts = [len(new) for new in self.new_tokens]
        return Generation(token_ids, reasons, self.prompt_lengths, counts, self.log_probabilities, texts)
