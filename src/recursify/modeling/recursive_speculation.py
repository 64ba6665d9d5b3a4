"""Self-speculation: the first recursions draft, the whole model verifies, and the output is that of the whole model.

A round drafts ``m`` tokens with an exit, then runs the deeper layers over all of them in one call, from the states and
KV cache that drafting computed: nothing is computed twice. Under greedy decoding drafts are accepted up to the first
that differs from the whole model's token; under sampling a draft ``x`` is accepted with probability
``min(1, p(x) / q(x))`` and replaced by a sample of ``max(p − q, 0)`` otherwise, which preserves the whole model's
distribution ``p`` (Leviathan et al., arXiv 2211.17192). Either way the whole model adds one more token.

It needs no training; the gain depends on the acceptance rate of the exit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .recursive_columns import on_device, pick
from .recursive_decoding import DepthDecoder
from .recursive_exit_settings import ExitSettings
from .recursive_policies import make_policy


@dataclass(frozen=True)
class SpeculationSettings:
    """Settings of speculation for one call of ``generate``.

    Attributes:
        depth: Depth of the exit that drafts.
        num_drafts: Number of drafted tokens per round at the beginning.
        adaptive: Flag to adapt that number, see :class:`DraftLength`, down to none where the exit is seldom right.
        max_drafts: Maximum number of drafted tokens per round.
        layers: Number of layers to draft after instead, with the model's own norm and head.
    """

    depth: int = 0
    num_drafts: int = 4
    adaptive: bool = True
    max_drafts: int = 16
    layers: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.num_drafts <= self.max_drafts:
            raise ValueError(
                f"num_drafts must be from 1 to max_drafts, got {self.num_drafts} and max_drafts={self.max_drafts}."
            )


class DraftLength:
    """Number of tokens of a row to draft next, learned from the accepted ones.

    A draft costs the fraction ``r`` of a step of the whole model, and saves one step if it is accepted. If each draft
    is accepted with probability ``α`` given those before it, the ``m``-th is with ``α^m``: drafts pay while that is
    above ``r``. If not even the first pays, one token is drafted now and then, to notice when the text becomes easier.
    """

    DECAY = 0.9
    """Decay of the counts, per round that drafts."""
    PAUSES = (8, 64)
    """Rounds without drafts before another is tried: first and maximum number; doubled after each that fails."""

    def __init__(self, settings: SpeculationSettings, cost: float) -> None:
        self.settings, self.cost = settings, cost
        self.length = settings.num_drafts
        self.kept = self.tried = 2.0
        self.pause = self.left = self.PAUSES[0]

    def learn(self, drafted: int, accepted: int) -> None:
        """Update after a round of ``drafted`` tokens, ``accepted`` of which were accepted."""
        if not self.settings.adaptive:
            return
        if not drafted:
            self.left -= 1
            self.length = int(self.left <= 0)
            return
        # Drafts after the first rejected one were not tested.
        self.kept = self.DECAY * self.kept + accepted
        self.tried = self.DECAY * self.tried + min(accepted + 1, drafted)
        rate = self.kept / self.tried
        paying = self.settings.max_drafts if rate >= 1 else int(math.log(self.cost) / math.log(rate))
        if not paying:
            self.pause = self.PAUSES[0] if accepted else min(2 * self.pause, self.PAUSES[1])
            self.left = self.pause
        self.length = min(paying, self.length + 2, self.settings.max_drafts)


@dataclass
class SpeculationOutput(GenerateDecoderOnlyOutput):
    """Output of ``generate(speculate=…, return_dict_in_generate=True)``.

    Attributes:
        drafted: Number of drafted tokens ``[B]``.
        accepted: Number of accepted drafts ``[B]``.
        rounds: Number of calls of the deeper layers ``[B]``.
    """

    drafted: Tensor | None = None
    accepted: Tensor | None = None
    rounds: Tensor | None = None


class Speculator:
    """Speculation in one call of ``generate``, whose ``processor`` and configuration it takes; rows are independent.

    ``attention_mask [B, T]`` is that of the prompts.
    """

    def __init__(
        self, model: Any, settings: SpeculationSettings, attention_mask: Tensor, processor: Any, generation_config: Any
    ) -> None:
        num_rows, self.max_length = len(attention_mask), generation_config.max_length
        cuts = None if settings.layers is None else (settings.layers,)
        never = ExitSettings(make_policy("confidence", 1.0), layers=cuts)
        self.decoder = DepthDecoder(model, [never] * num_rows, attention_mask, self.max_length)
        if not 0 <= settings.depth < self.decoder.num_exits:
            raise ValueError(
                f"There is no exit after depth {settings.depth} to draft by: the model has {self.decoder.num_exits}."
            )
        self.settings = settings
        self.processor = processor
        self.samples = generation_config.do_sample
        cost = self._draft_cost(model)
        self.lengths = [DraftLength(settings, cost) for _ in range(num_rows)]
        self.drafted, self.accepted, self.rounds = ([0] * num_rows for _ in range(3))

    def choose(self, rows: list[int], texts: list[Tensor], logits: Tensor) -> tuple[Tensor, Tensor]:
        """Next tokens ``[s]`` and their distributions ``[s, V]`` (scores when greedy), given ``logits [s, V]``.

        ``texts`` are the ids before each token, in ``rows``, of which one may occur more than once.
        """
        scores = logits.float()
        if self.processor:
            scores = torch.stack([self._process(*entry) for entry in zip(rows, texts, scores, strict=True)])
        if not self.samples:
            return scores.argmax(-1), scores
        p = scores.softmax(-1)
        return torch.multinomial(p, 1)[:, 0], p

    def _process(self, row: int, text: Tensor, scores: Tensor) -> Tensor:
        """Processed scores ``[V]`` after ``text``, in the row's place: processors may know the whole batch."""
        size = len(self.lengths)
        return self.processor(text.expand(size, -1), scores.expand(size, -1))[row]

    def round(self, texts: list[Tensor], rows: list[int]) -> list[Tensor]:
        """Generate tokens for ``rows``, at least one each; the last token of each of ``texts`` has not run yet."""
        decoder = self.decoder
        start = {row: len(texts[row]) for row in rows}
        wanted = {row: min(self.lengths[row].length, self.max_length - start[row] - 1) for row in rows}
        tried = {row: texts[row] for row in rows}
        q: dict[int, list[Tensor]] = {row: [] for row in rows}  # distributions of the drafts, or scores when greedy
        drafting = rows
        while drafting:
            last = texts[0].new_zeros(len(texts))
            last[on_device(drafting, last.device)] = torch.stack([tried[row][-1] for row in drafting])
            decoder.append(last, drafting)
            for segment in range(self.settings.depth + 1):
                states = decoder.advance(segment, drafting)[:, -1]
            going_on = [row for row in drafting if len(q[row]) < wanted[row]]
            if going_on:
                places = [drafting.index(row) for row in going_on]
                logits = decoder.compute_exit_logits(self.settings.depth, pick(states, places), going_on)
                tokens, scores = self.choose(going_on, [tried[row] for row in going_on], logits)
                for row, token, score in zip(going_on, tokens, scores, strict=True):
                    tried[row] = torch.cat([tried[row], token[None]])
                    q[row].append(score)
            drafting = going_on
        for segment in range(self.settings.depth + 1, decoder.num_exits + 1):
            states = decoder.advance(segment, rows)
        settled = []
        for place, row in enumerate(rows):
            count = len(q[row])
            logits = decoder.compute_logits(states[place, -count - 1 :])
            prefixes = [tried[row][: start[row] + n] for n in range(count + 1)]
            choices, p = self.choose([row] * (count + 1), prefixes, logits)
            settled.append(self._settle(tried[row][start[row] :], q[row], choices, p))
        # One copy for all rows: every device-to-host copy synchronizes.
        accepted = torch.stack([count for _, count in settled]).tolist()
        for row, count in zip(rows, accepted, strict=True):
            self._take_back(row, len(q[row]), count)
        return [tokens[: count + 1] for (tokens, _), count in zip(settled, accepted, strict=True)]

    def _settle(self, drafts: Tensor, q: list[Tensor], choices: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens ``[m + 1]`` that begin with the accepted drafts and the one after them, and the accepted number.

        ``q`` are the distributions of the ``drafts [m]``; ``choices [m + 1]`` and ``p [m + 1, V]`` the whole model's.
        """
        if not self.samples:
            return choices, (drafts == choices[: len(drafts)]).long().cumprod(0).sum()
        # After the last draft there is nothing to subtract: the sample is of p itself.
        q_all = torch.cat([torch.stack(q), torch.zeros_like(p[:1])]) if q else torch.zeros_like(p)
        place = torch.arange(len(drafts), device=p.device)
        keeps = torch.rand(len(drafts), device=p.device) * q_all[place, drafts] < p[place, drafts]
        count = keeps.long().cumprod(0).sum()
        rest = (p - q_all).clamp(min=0)
        rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)
        after = torch.multinomial(rest, 1)[:, 0]
        everywhere = torch.arange(len(p), device=p.device)
        return torch.where(everywhere < count, torch.cat([drafts, after[-1:]]), after), count

    def _take_back(self, row: int, drafted: int, accepted: int) -> None:
        """Drop the drafts after the first ``accepted`` ones, and update the number to draft next."""
        decoder = self.decoder
        decoder.rewind(row, drafted - accepted)
        self.drafted[row] += drafted
        self.accepted[row] += accepted
        self.rounds[row] += 1
        self.lengths[row].learn(drafted, accepted)

    def _draft_cost(self, model: Any) -> float:
        """Cost of a draft relative to a step of the whole model, by the weights that each reads."""
        layer = sum(weight.numel() for weight in model.model.block[0].parameters() if weight.ndim == 2)
        head, layers = model.lm_head.weight.numel(), sum(map(len, self.decoder.segments))
        drafting = sum(map(len, self.decoder.segments[: self.settings.depth + 1])) + len(self.decoder.exit_coda)
        return (drafting * layer + head) / (layers * layer + head)


def generate_speculatively(
    model: Any,
    input_ids: Tensor,
    *,
    settings: SpeculationSettings,
    streamer: Any = None,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    attention_mask: Tensor | None = None,
    **_: Any,
) -> Any:
    """Decode for ``generate(speculate=…)``, which passes everything that it has prepared.

    Returns:
        Token ids ``[B, T]``, or :class:`SpeculationOutput` if the generation config asks for one.

    Raises:
        ValueError: Beams, an exit that the model does not have, or right padding.
    """
    if generation_config.num_beams > 1:
        raise ValueError(
            f"Speculation works with one beam, and num_beams is {generation_config.num_beams}. Leave num_beams out."
        )
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    speculator = Speculator(model, settings, mask, logits_processor, generation_config)
    texts, rows = list(input_ids), list(range(len(input_ids)))
    first = speculator.choose(rows, texts, speculator.decoder.prefill(input_ids))[0]
    new: dict[int, Tensor] = dict(zip(rows, first.split(1), strict=True))
    while True:
        ends = []
        for row, chosen in new.items():
            longer = torch.cat([texts[row], chosen])
            lengths = range(len(texts[row]) + 1, len(longer) + 1)
            ends.append(torch.cat([stopping_criteria(longer[None, :length], None) for length in lengths]))
        stops = torch.nn.utils.rnn.pad_sequence(ends, batch_first=True).tolist()
        for (row, chosen), stop in zip(new.items(), stops, strict=True):
            count = stop.index(True) + 1 if True in stop else len(chosen)
            texts[row] = torch.cat([texts[row], chosen[:count]])
            if streamer is not None:
                for token in chosen[:count].cpu():
                    streamer.put(token[None])
        rows = [row for row, stop in zip(new, stops, strict=True) if True not in stop]
        if not rows:
            break
        new = dict(zip(rows, speculator.round(texts, rows), strict=True))
    if streamer is not None:
        streamer.end()
    pad = generation_config._pad_token_tensor
    sequences = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=0 if pad is None else int(pad))
    if not generation_config.return_dict_in_generate:
        return sequences
    counts = {name: torch.tensor(getattr(speculator, name)) for name in ("drafted", "accepted", "rounds")}
    return SpeculationOutput(sequences=sequences, **counts)
