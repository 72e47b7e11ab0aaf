"""Files that are read for several devices: what each of them holds meanwhile."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from folojax import LLM, SamplingParams
from folojax.backend import choose_backend
from folojax.backend.devices import Devices
from folojax.models.files.checkpoint import load_params, open_checkpoint
from tests.letters import make_letters_tokenizer
from tests.reference import MORE_LIMITS

DEVICES = jax.devices()
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


def test_files_are_read_to_their_shards(
    tiny_directory: Path, tiny_model: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A parameter is on no device as a whole."""
    sizes: list[int] = []
    put = jax.device_put

    def watched(x: Any, place: Any = None, **options: Any) -> Any:
        out = put(x, place, **options)
        sizes.extend(leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(out))
        return out

    monkeypatch.setattr(jax, "device_put", watched)
    tokenizer = make_letters_tokenizer()
    made = LLM(tiny_directory, tokenizer, dtype="float32", **MORE_LIMITS, tensor_parallel_size=2)
    assert max(sizes) == 96 * 64  # of gate_up, which has 192 rows
    alone = LLM(tiny_model, **MORE_LIMITS)
    ends = [one.generate([5, 17, 99, 3], GREEDY, use_tqdm=False) for one in (made, alone)]
    assert ends[0][0].outputs[0].token_ids == ends[1][0].outputs[0].token_ids


def test_no_device_has_more_while_files_are_read_than_in_the_end(
    tiny_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all arrays that JAX has, whenever a parameter is placed or waited for."""
    peaks = dict.fromkeys(DEVICES[:2], 0)
    before = held(DEVICES[:2])
    wait = jax.block_until_ready

    def watched(leaf: Any) -> Any:
        out = wait(leaf)
        for device, size in held(DEVICES[:2]).items():
            peaks[device] = max(peaks[device], size - before[device])
        return out

    monkeypatch.setattr(jax, "block_until_ready", watched)
    backend = choose_backend(Devices(tuple(DEVICES[:2])))
    checkpoint = open_checkpoint(tiny_directory)
    place = functools.partial(backend.devices.place_param, config=checkpoint.config)
    params = load_params(checkpoint, jnp.float32, place=place)
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    for device in DEVICES[:2]:
        shards = (one for leaf in jax.tree.leaves(params) for one in leaf.addressable_shards)
        size = sum(one.data.nbytes for one in shards if one.device == device)
        assert size < 0.51 * whole
        assert size <= peaks[device] <= 1.15 * size


def held(devices: Any) -> dict[Any, int]:
    """Bytes of JAX's arrays on each device, those once that several share."""
    shards = [one for array in jax.live_arrays() for one in array.addressable_shards]
    found = {(one.device, one.data.unsafe_buffer_pointer()): one.data.nbytes for one in shards}
    return {
        device: sum(size for (where, _), size in found.items() if where == device)
        for device in devices
    }
