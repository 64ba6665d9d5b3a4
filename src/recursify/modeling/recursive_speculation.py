"""Self-speculation: the first recursions draft, the whole model checks, and what comes out is what it alone would say.

A round drafts ``m`` tokens by an exit, then runs the deeper layers over all of them in one call, from the states at the
exit, which drafting has left there (keys and values, too): nothing is computed twice. The whole model's choices settle
the round: under greedy decoding drafts are kept up to the first that differs; under sampling a draft ``x`` is kept with
probability ``min(1, p(x) / q(x))`` and replaced by a draw from ``max(p − q, 0)`` otherwise, which leaves the whole
model's distribution ``p`` as it is (Leviathan et al., arXiv 2211.17192). Either way its next choice comes on top.

It needs no training; how much it gains is how often the exit is right.

This file travels inside every checkpoint: it imports torch and transformers only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .recursive_decoding import DepthDecoder, on_device, pick
from .recursive_policies import ExitSettings, make_policy


@dataclass(frozen=True)
class SpeculationSettings:
    """How a call of ``generate`` speculates.

    Attributes:
        depth: The exit that drafts.
        num_drafts: Drafted tokens per round, at first.
        adaptive: Draft as many as pay, see :class:`DraftLength`; none, where the exit is seldom right.
        max_drafts: Drafted tokens per round at most.
        layers: Draft after so many layers instead, read out by the model's own norm and head.
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

    @classmethod
    def of(cls, given: Any) -> SpeculationSettings:
        """Settings, or ``True`` for those by default."""
        return cls() if given is True else given


class DraftLength:
    """How many tokens of a row to draft next, learned from how many were kept.

    A draft costs ``r`` of what a step of the whole model costs, and saves one if it is kept. Where each is kept with
    probability ``α`` if those before it are, the ``m``-th is with ``α^m``: drafts pay while that is above ``r``. If not
    even the first does, none is drafted but one in some rounds, to notice when the text becomes easier.

    Args:
        settings: Where to begin, and how far to go.
        cost: ``r``.
    """

    DECAY = 0.9
    """Of what was seen, per round that drafts."""
    PAUSES = (8, 64)
    """Rounds without drafts before another is tried: at first, and at most; twice as many after each that fails."""

    def __init__(self, settings: SpeculationSettings, cost: float) -> None:
        self.settings, self.cost = settings, cost
        self.length = settings.num_drafts
        self.kept = self.tried = 2.0
        self.pause = self.left = self.PAUSES[0]

    def learn(self, drafted: int, accepted: int) -> None:
        """After a round that drafted so many tokens, of which so many were kept."""
        if not self.settings.adaptive:
            return
        if not drafted:
            self.left -= 1
            self.length = int(self.left <= 0)
            return
        # Drafts after the first that was refused were not put to the test.
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
    """What ``generate(speculate=…, return_dict_in_generate=True)`` returns.

    Attributes:
        drafted: ``[B]``: tokens drafted.
        accepted: ``[B]``: drafts that were kept.
        rounds: ``[B]``: calls of the deeper layers.
    """

    drafted: Tensor | None = None
    accepted: Tensor | None = None
    rounds: Tensor | None = None


class Speculator:
    """One call of ``generate`` that speculates; rows go on independently.

    Args:
        model: A ``RecursiveForCausalLM``.
        settings: For all rows.
        attention_mask: ``[B, T]`` of the prompt.
        logits_processor: transformers', called with a row's text so far.
        generation_config: transformers', for ``do_sample`` and ``max_length``.
    """

    def __init__(
        self,
        model: Any,
        settings: SpeculationSettings,
        attention_mask: Tensor,
        logits_processor: Any,
        generation_config: Any,
    ) -> None:
        cuts = None if settings.layers is None else (settings.layers,)
        never = ExitSettings(make_policy("confidence", 1.0), layers=cuts)
        num_rows = len(attention_mask)
        self.decoder = DepthDecoder(model, [never] * num_rows, attention_mask, generation_config.max_length)
        if not 0 <= settings.depth < self.decoder.num_exits:
            raise ValueError(
                f"There is no exit after depth {settings.depth} to draft by: the model has {self.decoder.num_exits}."
            )
        self.settings = settings
        self.processor = logits_processor
        self.samples = generation_config.do_sample
        self.max_length = generation_config.max_length
        cost = self._draft_cost(model)
        self.lengths = [DraftLength(settings, cost) for _ in range(num_rows)]
        self.drafted, self.accepted, self.rounds = ([0] * num_rows for _ in range(3))

    def choose(self, rows: list[int], texts: list[Tensor], logits: Tensor) -> tuple[Tensor, Tensor]:
        """Next tokens ``[s]`` and their distributions ``[s, V]``; unscaled when greedy.

        Args:
            rows: The row of each text; it may come more than once.
            texts: The ids before the token.
            logits: ``[s, V]``.
        """
        scores = logits.float()
        if self.processor:
            scores = torch.stack([self._process(*each) for each in zip(rows, texts, scores, strict=True)])
        if not self.samples:
            return scores.argmax(-1), scores
        p = scores.softmax(-1)
        return torch.multinomial(p, 1)[:, 0], p

    def _process(self, row: int, text: Tensor, scores: Tensor) -> Tensor:
        """Scores ``[V]`` after ``text``, put in the row's place: processors may know of the whole batch."""
        size = len(self.lengths)
        return self.processor(text.expand(size, -1), scores.expand(size, -1))[row]

    def round(self, texts: list[Tensor], rows: list[int]) -> list[Tensor]:
        """Tokens that ``rows`` get, at least one each; ``texts`` by row, of which the last token has not run yet."""
        decoder = self.decoder
        room = {row: self.max_length - len(texts[row]) - 1 for row in rows}
        wanted = {row: min(self.lengths[row].length, room[row]) for row in rows}
        start = {row: len(texts[row]) for row in rows}
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
        # All rows' in one: every fetch waits for the device.
        accepted = torch.stack([count for _, count in settled]).tolist()
        for row, count in zip(rows, accepted, strict=True):
            self._take_back(row, len(q[row]), count)
        return [tokens[: count + 1] for (tokens, _), count in zip(settled, accepted, strict=True)]

    def _settle(self, drafts: Tensor, q: list[Tensor], choices: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens ``[m + 1]`` that begin with the drafts kept and the one after them, and how many of ``[m]`` are kept.

        Args:
            drafts: Drafted tokens.
            q: Their distributions.
            choices: ``[m + 1]``, the whole model's.
            p: ``[m + 1, V]``, its distributions.
        """
        if not self.samples:
            return choices, (drafts == choices[: len(drafts)]).long().cumprod(0).sum()
        # After the last draft there is nothing to take off, and the draw is from p itself.
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
        """Forget the drafts after the first ``accepted``, and learn how many to try next."""
        decoder = self.decoder
        decoder.rewind(row, drafted - accepted)
        self.drafted[row] += drafted
        self.accepted[row] += accepted
        self.rounds[row] += 1
        self.lengths[row].learn(drafted, accepted)

    def _draft_cost(self, model: Any) -> float:
        """What a draft costs of a step of the whole model, by the weights that each reads."""
        layer = sum(weight.numel() for weight in model.model.block[0].parameters() if weight.ndim == 2)
        head, layers = model.lm_head.weight.numel(), sum(map(len, self.decoder.segments))
        drafting = sum(map(len, self.decoder.segments[: self.settings.depth + 1]))
        if self.settings.layers is None and model.config.exit_through_coda:
            drafting += len(model.config.layout.coda_positions)
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
    """The decoding loop behind ``generate(speculate=…)``, called by it with all that it has prepared.

    Returns:
        Token ids ``[B, T]``, or :class:`SpeculationOutput` if the generation config asks for one.

    Raises:
        ValueError: Beams, an exit that is not there, or right padding.
    """
    if generation_config.num_beams > 1:
        raise ValueError(
            f"Speculation works with one beam, and num_beams is {generation_config.num_beams}. Leave num_beams out."
        )
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    speculator = Speculator(model, settings, mask, logits_processor, generation_config)
    texts = list(input_ids)
    rows = list(range(len(texts)))
    first = speculator.choose(rows, texts, speculator.decoder.prefill(input_ids))[0]
    new: dict[int, Tensor] = {row: first[row : row + 1] for row in rows}
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
    drafted, accepted, rounds = (
        torch.tensor(counts) for counts in (speculator.drafted, speculator.accepted, speculator.rounds)
    )
    return SpeculationOutput(sequences=sequences, drafted=drafted, accepted=accepted, rounds=rounds)
