"""Batch inference over many machines: an engine for each actor of a Ray Data pipeline.

    import ray
    from folojax.adapters.ray_data import Generator

    dataset = ray.data.read_json("prompts.jsonl").map_batches(
        Generator,
        fn_constructor_kwargs={"model": "path/to/model", "sampling_params": {"max_tokens": 64}},
        compute=ray.data.ActorPoolStrategy(size=8),
        num_gpus=1,  # devices of each actor: tensor_parallel_size * data_parallel_size of them
        batch_size=1024,
    )
    dataset.write_parquet("answers")

An actor runs a batch of rows as one continuous batch, and is idle while its last rows finish: let
`batch_size` be several times `max_num_seqs`. Ray gives an actor its devices before JAX looks for
them. The process that builds the pipeline builds no engine and needs no device.

Nothing of Ray is imported: it calls an object of this class with columns. Tried with Ray 2.60.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from folojax.jsonl.lines import line_seed
from folojax.llm import LLM
from folojax.requests.outputs import CompletionOutput
from folojax.requests.prompts import Prompt, parse_prompt
from folojax.requests.sampling_params import SamplingParams

_COLUMNS = ("text", "token_ids", "finish_reason", "error")


class Generator:
    """Continues the prompts of a batch of rows; what `ray.data.Dataset.map_batches` takes.

    A row gets its columns whatever becomes of its neighbours: one that is refused, or whose logits
    are NaN, has the reason in `<prefix>error`. Its tokens do not depend on the actor, the batch or
    the number of actors.

    Args:
        sampling_params: Of all rows, or a dict of SamplingParams' fields; None is the model's own.
        prompt_column: Text, token ids, or conversations: lists of {"role": ..., "content": ...},
            which go through the chat template.
        id_column: What tells rows apart: where no seed is given, a row's seed is made of its id
            and of the engine's `seed`. None: of its prompt, so that equal prompts get equal
            samples.
        output_prefix: Of the columns that are added: `<prefix>text` (string), `<prefix>token_ids`
            (list of int), `<prefix>finish_reason` (string) and `<prefix>error` (string, empty
            where all is well). With `n` above 1 the first three are lists, an entry a sample.
        **options: As `LLM` takes them, `model` among them.

    Raises:
        ValueError: a parameter or an option is refused.
    """

    def __init__(
        self,
        sampling_params: SamplingParams | Mapping[str, Any] | None = None,
        *,
        prompt_column: str = "prompt",
        id_column: str | None = None,
        output_prefix: str = "output_",
        **options: Any,
    ) -> None:
        if isinstance(sampling_params, Mapping):
            sampling_params = SamplingParams(**sampling_params)
        self._llm = LLM(**options)
        self._sampling_params = (
            self._llm.default_sampling_params if sampling_params is None else sampling_params
        )
        self._prompt_column = prompt_column
        self._id_column = id_column
        self._prefix = output_prefix

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Adds the outputs of B rows.

        Args:
            batch: Columns [B, ...], as Ray's "numpy" batch format has them.

        Returns:
            The same columns and four more, [B].

        Raises:
            ValueError: a column is missing, or there already.
        """
        self._check_columns(batch)
        prompts = batch[self._prompt_column]
        ids = batch[self._id_column] if self._id_column else [None] * len(prompts)
        # NumPy by itself would make a matrix of lists of equal length.
        columns = {self._prefix + name: np.empty(len(prompts), object) for name in _COLUMNS}

        def fill(row: int, samples: Sequence[CompletionOutput], error: str) -> None:
            fields: list[Any] = [[getattr(one, name) for one in samples] for name in _COLUMNS[:3]]
            if self._sampling_params.n == 1:
                fields = [field[0] for field in fields] if samples else ["", [], "error"]
            for column, value in zip(columns.values(), [*fields, error], strict=True):
                column[row] = value

        accepted: dict[int, tuple[Prompt, SamplingParams]] = {}
        for row, (prompt, row_id) in enumerate(zip(prompts, ids, strict=True)):
            try:
                accepted[row] = self._request(prompt, row_id)
            except ValueError as refused:
                fill(row, [], str(refused))
        outputs = self._llm.generate(
            [prompt for prompt, _ in accepted.values()],
            [sampling_params for _, sampling_params in accepted.values()],
            use_tqdm=False,
        )
        for row, output in zip(accepted, outputs, strict=True):
            failed = [one for one in output.outputs if one.finish_reason == "error"]
            fill(row, output.outputs, "; ".join(str(one.stop_reason) for one in failed))
        return batch | columns

    def _check_columns(self, batch: Mapping[str, np.ndarray]) -> None:
        wanted = [self._prompt_column, *([self._id_column] if self._id_column else [])]
        if missing := [name for name in wanted if name not in batch]:
            raise ValueError(
                f"there is no column {missing}; the batch has {sorted(batch)}: set prompt_column "
                "and id_column"
            )
        if taken := [self._prefix + name for name in _COLUMNS if self._prefix + name in batch]:
            raise ValueError(f"the batch has {taken} already: set output_prefix")

    def _request(self, prompt: Any, row_id: Any) -> tuple[Prompt, SamplingParams]:
        """What a row asks of the engine; ValueError if it will be refused."""
        engine = self._llm.engine
        is_list = isinstance(prompt, Sequence | np.ndarray) and not isinstance(prompt, str)
        if is_list and len(prompt) and isinstance(prompt[0], Mapping):
            prompt = self._llm.render_chat(list(prompt))
        parsed = parse_prompt(prompt, engine.tokenizer)
        sampling_params = self._sampling_params
        if sampling_params.seed is None and not sampling_params.is_greedy:
            told_apart_by = list(parsed.token_ids) if row_id is None else row_id
            seed = line_seed(self._llm.config.seed, str(told_apart_by))
            sampling_params = dataclasses.replace(sampling_params, seed=seed)
        engine.make_request("row", parsed, sampling_params)
        return {"prompt_token_ids": parsed.token_ids}, sampling_params
