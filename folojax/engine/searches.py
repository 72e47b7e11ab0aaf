"""Searches: calls of which each step asks for what the step before has found."""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any

from tqdm.auto import tqdm

from folojax.engine.live_request import LiveGeneration
from folojax.engine.lora_calls import LoraCalls
from folojax.requests.beams import BeamSearch, BeamSearchOutput, BeamSearchParams
from folojax.requests.lora_request import LoRARequest, LoRAs
from folojax.requests.prompts import ParsedPrompt, Prompt, each_named, parse_prompts
from folojax.requests.sampling_params import SamplingParams


class Searches(LoraCalls):
    """The part of `LLM` that searches."""

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        lora_request: LoRARequest | None = None,
        use_tqdm: bool = False,
        concurrency_limit: int | None = None,
    ) -> list[BeamSearchOutput]:
        """The likeliest continuations of prompts, as far as so many beams find them.

        Each step is a request for one token of each open beam of every prompt; its other keys and
        values are in the prefix cache, but for the page that is not full yet. Beams are ranked and
        ended as in transformers (`folojax.requests.beams`).

        Args:
            prompts: As in `generate`.
            params: Of all of them.
            lora_request: The adapter of all of them.
            use_tqdm: Shows a progress bar on a terminal.
            concurrency_limit: Most prompts that are searched from at once; None is all.

        Raises:
            ValueError: a prompt or the parameters are refused.
            RuntimeError: the engine sleeps.
        """
        parsed = parse_prompts(prompts, self.engine.tokenizer)
        searches = each_named("prompt", parsed, lambda one: self._search(one, params))
        limit = len(searches) if concurrency_limit is None else concurrency_limit
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < min(1, len(searches)):
            raise ValueError(f"concurrency_limit is {limit!r}; it must be an integer of at least 1")
        for first in range(0, len(searches), max(limit, 1)):
            self._run(searches[first : first + limit], params, use_tqdm, lora_request)
        return [self._found(search) for search in searches]

    @abc.abstractmethod
    def _make_requests(
        self,
        kind: str,
        prompts: Any,
        sampling_params: Any,
        priority: Any = None,
        lora_request: LoRAs = None,
    ) -> list[LiveGeneration]:
        """Parses and checks the prompts of a call; nothing is queued yet."""

    def _search(self, prompt: ParsedPrompt, params: BeamSearchParams) -> BeamSearch:
        """The search from a prompt; ValueError if it is refused."""
        validator = self.engine.validator
        num_logprobs = BeamSearch.num_logprobs(params, validator.eos_token_ids)
        most = validator.vocab_size
        if validator.max_logprobs != -1:
            most = min(most, validator.max_logprobs)
        if num_logprobs > most:
            raise ValueError(
                f"beam_width is {params.beam_width}, which takes {num_logprobs} log-probabilities "
                f"of a token; there are {most}: lower it, or raise max_logprobs (-1 is no cap)"
            )
        asked = SamplingParams(max_tokens=params.max_tokens, temperature=0)
        validator.check("", prompt, asked)
        room = validator.limits.max_model_len - len(prompt.token_ids)
        max_tokens = min(params.max_tokens, room)
        return BeamSearch(prompt.token_ids, params, validator.eos_token_ids, max_tokens)

    def _run(
        self,
        searches: Sequence[BeamSearch],
        params: BeamSearchParams,
        use_tqdm: bool,
        lora_request: LoRARequest | None,
    ) -> None:
        num_logprobs = BeamSearch.num_logprobs(params, self.engine.validator.eos_token_ids)
        one = SamplingParams(temperature=0, max_tokens=1, logprobs=num_logprobs, ignore_eos=True)
        for _ in tqdm(range(params.max_tokens), disable=None if use_tqdm else True):
            beams = [beam.tokens for search in searches for beam in search.open]
            if not beams:
                return
            requests = self._make_requests("beam", beams, one, None, lora_request)
            rows: Any = [output.outputs[0] for output in self._shared.wait(requests, False)]
            for search in searches:
                mine, rows = rows[: len(search.open)], rows[len(search.open) :]
                if any(row.finish_reason != "length" for row in mine):
                    search.open = []  # aborted, or without a distribution: what has ended is left
                elif mine:
                    search.take([row.logprobs[0] for row in mine])

    def _found(self, search: BeamSearch) -> BeamSearchOutput:
        tokenizer = self.engine.tokenizer
        sequences = [beam for _, beam in search.ended]
        if tokenizer is not None:
            sequences = [
                dataclasses.replace(
                    beam, text=tokenizer.decode(beam.tokens, skip_special_tokens=False)
                )
                for beam in sequences
            ]
        return BeamSearchOutput(sequences)
