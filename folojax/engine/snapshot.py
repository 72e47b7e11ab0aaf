"""A request as a value: what it was asked, what it has said, and its K/V; in memory or on disk."""

import dataclasses
import json
import os
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from folojax.requests.outputs import Logprob
from folojax.requests.sampling_params import SamplingParams
from folojax.runner.host_store import TokenKV

_FORMAT = "folojax snapshot 1"


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a sample has so far, output token by output token."""

    token_ids: tuple[int, ...] = ()
    token_logprobs: tuple[float, ...] = ()
    logprobs: tuple[dict[int, Logprob], ...] | None = None  # the entries asked for, if any

    def take(self, num_tokens: int | None) -> "Progress":
        """The first tokens of it; ValueError if it has fewer."""
        if num_tokens is None:
            return self
        if not 0 <= num_tokens <= len(self.token_ids) or isinstance(num_tokens, bool):
            raise ValueError(
                f"num_output_tokens is {num_tokens!r}; the sample has {len(self.token_ids)} output "
                "tokens: give a number from 0 to that, or None for all"
            )
        logprobs = None if self.logprobs is None else self.logprobs[:num_tokens]
        return Progress(self.token_ids[:num_tokens], self.token_logprobs[:num_tokens], logprobs)


@dataclasses.dataclass(frozen=True, eq=False)
class Snapshot:
    """One sample of a request, as it stood."""

    prompt: str | None  # the text; None where token ids were given
    prompt_token_ids: tuple[int, ...]
    sampling_params: SamplingParams  # as they came with the request; `n` means nothing here
    seed: int | None  # of the sample; None for greedy
    progress: Progress  # what it had said
    # Of the first tokens of prompt and output; None: they are computed again, as are those that its
    # tokens alone would not give (activation edits, weights that changed).
    kv: TokenKV | None
    weights: str  # fingerprint of the parameters that they were computed with
    adapter: str | None = None  # its name; one of that name is known where it is resumed
    kv_bits: str | None = None  # what else their bits depend on; None: on the batch

    @property
    def output_token_ids(self) -> tuple[int, ...]:
        """The output tokens that the sample had when the snapshot was taken."""
        return self.progress.token_ids

    def without_kv(self) -> "Snapshot":
        """The same, to be computed again, with whatever weights."""
        return dataclasses.replace(self, kv=None)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file; `load_snapshot` reads it."""
        sampling_params = dataclasses.asdict(self.sampling_params)
        for name in ("logit_bias", "extra_args"):
            sampling_params[name] = sampling_params[name] and dict(sampling_params[name])
        fields: dict[str, Any] = {
            "format": _FORMAT,
            "prompt": self.prompt,
            "prompt_token_ids": self.prompt_token_ids,
            "sampling_params": sampling_params,
            "seed": self.seed,
            "token_ids": self.progress.token_ids,
            "token_logprobs": self.progress.token_logprobs,
            "logprobs": self.progress.logprobs and _to_lists(self.progress.logprobs),
            "weights": self.weights,
            "adapter": self.adapter,
            "kv_bits": self.kv_bits,
        }
        arrays = {}
        if self.kv is not None:
            fields["dtype"] = self.kv.keys.dtype.name
            arrays = {"keys": _as_numbers(self.kv.keys), "values": _as_numbers(self.kv.values)}
        save_file(arrays, path, metadata={"folojax": json.dumps(fields)})


def load_snapshot(path: str | os.PathLike[str]) -> Snapshot:
    """Reads what `Snapshot.save` has written.

    Raises:
        ValueError: it is another file, or a broken one.
        FileNotFoundError: there is none.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            fields = json.loads((file.metadata() or {}).get("folojax", "{}"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{os.fspath(path)!r} is no snapshot: {error}") from error
    if not isinstance(fields, dict) or fields.get("format") != _FORMAT:
        raise ValueError(f"{os.fspath(path)!r} is no snapshot that this version reads")
    try:
        return _from_fields(fields, arrays)
    # What is missing, unknown or misshapen fails somewhere, in some way.
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{os.fspath(path)!r} is no whole snapshot: {error!r}") from error


def _from_fields(fields: dict[str, Any], arrays: dict[str, np.ndarray]) -> Snapshot:
    kv = None
    if arrays:
        dtype = jnp.dtype(fields["dtype"])
        kv = TokenKV(arrays["keys"].view(dtype), arrays["values"].view(dtype))
    sampling_params = fields["sampling_params"]
    if sampling_params["logit_bias"]:
        sampling_params["logit_bias"] = {
            int(token): bias for token, bias in sampling_params["logit_bias"].items()
        }
    logprobs = fields["logprobs"]
    return Snapshot(
        prompt=fields["prompt"],
        prompt_token_ids=tuple(fields["prompt_token_ids"]),
        sampling_params=SamplingParams(**sampling_params),
        seed=fields["seed"],
        progress=Progress(
            tuple(fields["token_ids"]),
            tuple(fields["token_logprobs"]),
            None if logprobs is None else tuple(map(_from_lists, logprobs)),
        ),
        kv=kv,
        weights=fields["weights"],
        adapter=fields.get("adapter"),
        kv_bits=fields["kv_bits"],
    )


def _to_lists(logprobs: tuple[dict[int, Logprob], ...]) -> list[list[Any]]:
    return [
        [[token, one.logprob, one.rank, one.decoded_token] for token, one in entries.items()]
        for entries in logprobs
    ]


def _from_lists(entries: list[list[Any]]) -> dict[int, Logprob]:
    return {token: Logprob(*fields) for token, *fields in entries}


def _as_numbers(array: np.ndarray) -> np.ndarray:
    """A dtype that the file format's NumPy side knows."""
    array = np.ascontiguousarray(array)
    return array.view(np.uint16) if array.dtype == jnp.bfloat16 else array
