"""Evaluations of lm-evaluation-harness on an engine: the model type "folojax".

    python -m folojax.adapters.lm_eval --model folojax \
        --model_args pretrained=path/to/model,max_num_seqs=64 --tasks hellaswag,gsm8k

or, in a program, with an engine that is there already:

    from folojax.adapters.lm_eval import FolojaxLM

    lm_eval.simple_evaluate(FolojaxLM(llm), tasks=["hellaswag"])

All requests of a kind run in one continuous batch. Tokens, prefixes, truncation and stop strings
are those of lm-eval's own `hf` model, so the metrics are too. Written for lm-eval 0.4.13:
`pip install "folojax[lm-eval]"`.
"""

import dataclasses
import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)

from folojax.llm import LLM
from folojax.requests.sampling_params import SamplingParams

_LOG = logging.getLogger("folojax")

_SAMPLING = {name: name for name in ("top_p", "top_k", "min_p", "repetition_penalty", "seed")}
_SAMPLING["min_new_tokens"] = "min_tokens"
"""Further fields of a task's `generation_kwargs`, and their names in SamplingParams."""


@register_model("folojax")
class FolojaxLM(TemplateLM):
    """An engine as lm-eval asks for log-likelihoods and generations.

    Args:
        pretrained: A model as `LLM` takes it, or an LLM; None is the embedded default.
        max_length: Most tokens that the model may see; None is the engine's max_model_len. Texts
            that do not fit are cut where lm-eval's `hf` model cuts them under the same
            `max_length`, if it is below max_model_len. Else those that are scored have one token
            less, as an engine counts the last one too, which it only scores.
        max_gen_toks: Most output tokens where the task does not say.
        add_bos_token: Whether texts begin with BOS; None leaves it to the tokenizer.
        prefix_token_id: Stands before a text that nothing precedes; None is BOS, or else EOS.
        think_end_token: Of a generation only what follows this text counts.
        chat_template_args: Further variables of the chat template.
        batch_size: Given to every model by lm-eval, and not needed, as `max_batch_size` and
            `device`: `max_num_seqs` says how many requests run at once, JAX_PLATFORMS where.
        **options: As `LLM` takes them, if it is made here.

    Raises:
        ValueError: an option is refused, or the model has no tokenizer.
    """

    def __init__(
        self,
        pretrained: str | LLM | None = None,
        *,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        think_end_token: str | None = None,
        chat_template_args: Mapping[str, Any] | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if isinstance(pretrained, LLM) and options:
            raise ValueError(f"options {sorted(options)} come too late: give them to the LLM")
        self._llm = pretrained if isinstance(pretrained, LLM) else LLM(pretrained, **options)
        self.tokenizer = self._llm.get_tokenizer()
        if self.tokenizer is None:
            raise ValueError("the LLM has no tokenizer, and tasks are text: pass tokenizer=")
        most = self._llm.config.max_model_len
        if max_length is not None and not 1 < max_length <= most:
            raise ValueError(
                f"max_length is {max_length}; it must be from 2 to max_model_len, {most:,}"
            )
        self.max_length = most if max_length is None else max_length
        self.max_gen_toks = max_gen_toks
        self._max_scored = min(self.max_length + 1, most)
        self._add_bos_token = add_bos_token
        self._prefix_token_id = prefix_token_id
        self._think_end_token = think_end_token
        self._chat_template_args = dict(chat_template_args or {})

    @property
    def eot_token_id(self) -> int:
        """The end token."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that nothing precedes."""
        known = (self._prefix_token_id, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        return next(token for token in known if token is not None)

    @property
    def tokenizer_name(self) -> str:
        """The name by which lm-eval keys its cache of requests."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids of a text, which may begin with BOS already."""
        if add_special_tokens is None and has_bos_prefix(
            string, self.tokenizer.decode(self.prefix_token_id)
        ):
            add_special_tokens = False
        return self._encode(string, add_special_tokens)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihoods of whole texts, in windows where they are too long."""
        windows = [
            [
                (None, *utils.make_disjoint_window(window))
                for window in utils.get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self._max_scored - 1,
                    context_len=1,
                )
            ]
            for request in requests
        ]
        flat = list(itertools.chain.from_iterable(windows))
        found = iter(self._loglikelihood_tokens(flat, disable_tqdm=disable_tqdm))
        return [sum(next(found)[0] for _ in text) for text in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to stop strings; greedy, unless the task says otherwise."""
        prompts, params = [], []
        for context, gen_kwargs in (request.args for request in requests):
            params.append(one := self._sampling_params(gen_kwargs))
            has_bos = has_bos_prefix(context, self.tokenizer.bos_token)
            tokens = self._encode(context, False if has_bos else None)
            # With the room for all outputs kept free, as the `hf` model does.
            prompts.append({"prompt_token_ids": tokens[(one.max_tokens or 0) - self.max_length :]})
        outputs = self._llm.generate(prompts, params, use_tqdm=not disable_tqdm)
        texts = []
        for output, one in zip(outputs, params, strict=True):
            (sample,) = output.outputs
            if sample.finish_reason == "error":
                _LOG.warning("a generation was cut short: %s", sample.stop_reason)
            stop = list(one.stop or ())
            texts.append(postprocess_generated_text(sample.text, stop, self._think_end_token))
        return texts

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation; without its system messages if the template refuses them."""
        options: dict[str, Any] = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
            "chat_template_kwargs": self._chat_template_args,
        }
        try:
            rendered: Any = self._llm.render_chat(chat_history, **options)
        except ValueError as error:
            _LOG.warning("%s; trying without system messages", error)
            others = [message for message in chat_history if message["role"] != "system"]
            rendered = self._llm.render_chat(others, **options)
        return rendered["prompt"]

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether greedy decoding would write it."""
        contexts, continuations = [], []
        for _text, context, continuation in requests:
            room = self._max_scored - len(continuation)
            if room < 1:
                raise ValueError(
                    f"a continuation has {len(continuation):,} tokens; {self._max_scored - 1:,} "
                    "can be scored behind one of context: raise max_length or max_model_len"
                )
            contexts.append({"prompt_token_ids": context[-room:]})
            continuations.append({"prompt_token_ids": continuation})
        outputs = self._llm.score(contexts, continuations, use_tqdm=not disable_tqdm)
        return [
            (output.cumulative_logprob, output.is_greedy)
            if output.finish_reason == "length"
            else (float("nan"), False)
            for output in outputs
        ]

    def _encode(self, text: str, add_special_tokens: bool | None) -> list[int]:
        if add_special_tokens is None:
            add_special_tokens = self._add_bos_token
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        tokens = self.tokenizer.encode(text, **options)
        bos = self.tokenizer.bos_token_id
        # Special tokens need not include it.
        if add_special_tokens and self._add_bos_token and bos is not None and tokens[:1] != [bos]:
            tokens = [bos, *tokens]
        return tokens

    def _sampling_params(self, gen_kwargs: Mapping[str, Any]) -> SamplingParams:
        """A task's `generation_kwargs`, over the model's own defaults."""
        given = dict(normalize_gen_kwargs(dict(gen_kwargs), self.max_gen_toks))
        eos = self.tokenizer.decode(self.eot_token_id)
        stop = [text for text in handle_stop_sequences(given.pop("until"), eos=eos) if text]
        max_tokens = given.pop("max_gen_toks")
        is_greedy = not given.pop("do_sample")
        temperature = given.pop("temperature", 0.0)
        if unknown := sorted(given.keys() - _SAMPLING.keys()):
            raise ValueError(
                f"generation_kwargs holds {unknown}; besides until, max_gen_toks, do_sample and "
                f"temperature there may be {sorted(_SAMPLING)}"
            )
        if max_tokens >= self.max_length:
            raise ValueError(
                f"max_gen_toks is {max_tokens:,}; it must be below max_length, "
                f"{self.max_length:,}, to leave room for a prompt"
            )
        return dataclasses.replace(
            self._llm.default_sampling_params,
            temperature=0.0 if is_greedy else temperature,
            max_tokens=max_tokens,
            stop=stop,
            # It is cut off by lm-eval's own rule.
            include_stop_str_in_output=True,
            **{_SAMPLING[name]: value for name, value in given.items()},
        )


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
