"""Rollouts for tunix: an engine behind the interface of its rollout workers.

It follows `tunix.rl.rollout.base_rollout.BaseRollout` of google-tunix 0.1.7 by structure, and takes
the `completion_mask` of later versions too. tunix is neither imported nor needed. For `RLCluster`,
which looks at types:

    from tunix.rl.rollout import base_rollout
    from folojax.adapters.tunix import Rollout

    base_rollout.BaseRollout.register(Rollout)
    ClusterConfig(rollout_engine=functools.partial(Rollout, llm, to_params=from_actor), ...)

where `from_actor` makes the engine's parameters of what the trainer hands over.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from folojax.llm import LLM
from folojax.requests.sampling_params import SamplingParams


class RolloutConfig(Protocol):
    """What `Rollout.generate` reads of tunix's RolloutConfig; the rest is of other engines."""

    max_tokens_to_generate: int
    temperature: float  # 0 is greedy
    top_p: float | None  # None is 1
    top_k: int | None  # None is off
    seed: Any  # a JAX key, new or old, or an integer; None draws from the engine's seed
    max_prompt_length: int  # width of the padded prompts, at least
    eos_tokens: Sequence[int] | None  # end an output in place of the model's own; None: those
    return_logprobs: bool


@dataclasses.dataclass
class RolloutOutput:
    """B samples, with the fields of tunix's RolloutOutput."""

    text: list[str]  # without special tokens
    logits: None  # they never leave the device
    tokens: list[np.ndarray]  # of each sample, int32 [N]: the end token included
    left_padded_prompt_tokens: np.ndarray  # int32 [B, P]
    logprobs: list[np.ndarray] | None
    """Of each sample, float32 [N]: in the distribution at the sampling temperature, nothing cut
    off, as tunix's own sampler reports them; None if not asked for. At temperatures 0 and 1 it is
    the model's own; else it is without those rows of the vocabulary that are padding."""


class Rollout:
    """An engine as tunix asks for rollouts, and for the log-probabilities of old ones.

    Args:
        llm: The engine, with a tokenizer.
        to_params: Makes the engine's parameters of those that `update_params` is given; None: they
            are the engine's own.
        pad_id: None is the tokenizer's, or else its end token.
        **cluster: What RLCluster gives to every worker (rollout_actor, tokenizer, mesh,
            rollout_config). Not needed: the engine has its own.

    Raises:
        ValueError: the tokenizer is missing, or has no end token.
    """

    def __init__(
        self,
        llm: LLM,
        *,
        to_params: Callable[[Any], Any] | None = None,
        pad_id: int | None = None,
        **cluster: Any,
    ) -> None:
        tokenizer = llm.get_tokenizer()
        if tokenizer is None or tokenizer.eos_token_id is None:
            raise ValueError("rollouts need a tokenizer with an end token: pass tokenizer= to LLM")
        known = (pad_id, tokenizer.pad_token_id, tokenizer.eos_token_id)
        self._llm = llm
        self._to_params = to_params
        self._eos_id: int = tokenizer.eos_token_id
        self._pad_id: int = next(token for token in known if token is not None)

    def generate(
        self, prompts: Sequence[str], rollout_config: RolloutConfig, **kwargs: Any
    ) -> RolloutOutput:
        """Samples continuations of prompts, all in one continuous batch.

        Equal prompts, of which tunix makes a group, get samples of their own.

        Args:
            prompts: Texts. Those that begin with BOS, as templates write it, get no second one.
            rollout_config: tunix's, or whatever has these fields.
            **kwargs: Further fields of SamplingParams. With `n`, the samples of a prompt stand
                together.

        Raises:
            ValueError: a prompt or a parameter is refused; nothing was sampled.
        """
        fields: dict[str, Any] = {
            "max_tokens": rollout_config.max_tokens_to_generate,
            "temperature": rollout_config.temperature,
            "top_p": 1.0 if rollout_config.top_p is None else rollout_config.top_p,
            "top_k": rollout_config.top_k or 0,
            "record": rollout_config.return_logprobs,
        }
        if rollout_config.eos_tokens is not None:
            fields |= {"stop_token_ids": rollout_config.eos_tokens, "ignore_eos": True}
        params = SamplingParams(**fields | kwargs)
        seeds = _seeds(rollout_config.seed, len(prompts))
        outputs = self._llm.generate(
            [{"prompt_token_ids": self._encode(prompt)} for prompt in prompts],
            [dataclasses.replace(params, seed=seed) for seed in seeds],
            use_tqdm=False,
        )
        samples = [sample for output in outputs for sample in output.outputs]
        prompt_tokens = [output.prompt_token_ids for output in outputs for _ in output.outputs]
        field = "raw" if params.is_greedy or params.temperature == 1 else "tempered"
        logprobs = [
            np.array([getattr(one, field) for one in sample.record or ()], np.float32)
            for sample in samples
        ]
        return RolloutOutput(
            text=[sample.text for sample in samples],
            logits=None,
            tokens=[np.array(sample.token_ids, np.int32) for sample in samples],
            left_padded_prompt_tokens=self._pad(prompt_tokens, rollout_config.max_prompt_length),
            logprobs=logprobs if params.record else None,
        )

    def get_per_token_logps(
        self,
        prompt_tokens: ArrayLike,
        completion_tokens: ArrayLike,
        completion_mask: ArrayLike | None = None,
    ) -> Float[Array, "B C"]:
        """Log-probabilities of completions in the model's own distribution, with no gradient.

        In deterministic mode they are the bits of sampling.

        Args:
            prompt_tokens: int32 [B, P], padded at the left.
            completion_tokens: int32 [B, C], padded at the right.
            completion_mask: bool [B, C], True up to a completion's end. None: it ends with its
                first end token or, if it has none, before its padding.

        Returns:
            float32; 0 behind a completion's end.

        Raises:
            ValueError: a prompt is empty, or one with its completion too long.
        """
        prompts, completions = np.asarray(prompt_tokens), np.asarray(completion_tokens)
        if completion_mask is None:
            lengths = [self._completion_length(row) for row in completions]
        else:
            lengths = [_last(row) + 1 for row in np.asarray(completion_mask, bool)]
        rows = [row for row, length in enumerate(lengths) if length]
        scores = self._llm.score(
            [self._strip(prompts[row]).tolist() for row in rows],
            [completions[row, : lengths[row]].tolist() for row in rows],
            use_tqdm=False,
        )
        found = np.zeros(completions.shape, np.float32)
        for row, score in zip(rows, scores, strict=True):
            found[row, : lengths[row]] = score.logprobs or np.nan
        return jnp.asarray(found)

    def update_params(self, params: Any, filter_types: tuple[Any, ...] | None = None) -> None:
        """Goes on with other parameters, as `to_params` or else `LLM.update_params` takes them.

        `filter_types`, the kinds that they were narrowed to, `to_params` can tell from themselves.

        Raises:
            ValueError: they are not those of the engine's model; nothing has changed.
        """
        self._llm.update_params(self._to_params(params) if self._to_params else params)

    def pad_id(self) -> int:
        """What arrays are padded with."""
        return self._pad_id

    def eos_id(self) -> int:
        """The tokenizer's end token."""
        return self._eos_id

    def model(self) -> Any:
        """None: tunix would read the state of an nnx module from it, and the engine's is none.

        So tunix knows that trainer and engine share no weights, and calls `update_params`.
        """
        return None

    def _encode(self, prompt: str) -> list[int]:
        tokenizer = self._llm.get_tokenizer()
        has_bos = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
        return tokenizer.encode(prompt, add_special_tokens=not has_bos)

    def _pad(self, prompts: Sequence[Sequence[int]], width: int) -> np.ndarray:
        """Prompts padded at the left: int32 [B, P]."""
        longest = max(map(len, prompts), default=0)
        if longest > width:
            # As tunix's own workers do, so that a trainer meets few widths.
            width = 1 << (longest - 1).bit_length()
        padded = np.full((len(prompts), width), self._pad_id, np.int32)
        for row, tokens in enumerate(prompts):
            padded[row, width - len(tokens) :] = tokens
        return padded

    def _strip(self, padded: np.ndarray) -> np.ndarray:
        """A prompt without its padding."""
        return padded[np.append(np.flatnonzero(padded != self._pad_id), len(padded))[0] :]

    def _completion_length(self, padded: np.ndarray) -> int:
        """Up to the first end token, which may be the padding's too, or up to the padding."""
        ends = np.flatnonzero(padded == self._eos_id)
        return int(ends[0]) + 1 if len(ends) else _last(padded != self._pad_id) + 1


def _last(is_there: np.ndarray) -> int:
    """Index of the last True of [N]; -1 if there is none."""
    return int(np.flatnonzero(is_there)[-1]) if is_there.any() else -1


def _seeds(seed: Any, count: int) -> list[int | None]:
    """A seed for each prompt; None where the engine is to draw one."""
    if seed is None:
        return [None] * count
    if isinstance(seed, jax.Array) and jnp.issubdtype(seed.dtype, jax.dtypes.prng_key):
        seed = jax.random.key_data(seed)
    entropy = [int(word) for word in np.ravel(np.asarray(seed))]
    return [int(word) for word in np.random.SeedSequence(entropy).generate_state(count, np.uint64)]
