"""How tensors of a GGUF file become one of a Hugging Face checkpoint."""

from collections.abc import Callable

import numpy as np

from folojax.models.core.recurrent import Recurrent

Parts = list[np.ndarray]


def alone(parts: Parts) -> np.ndarray:
    """The only one, as it is."""
    return parts[0]


def behind_each_other(parts: Parts) -> np.ndarray:
    """Of Granite's kernels, and of experts: [..., 2F, E] of two [..., F, E]."""
    return np.concatenate(parts, axis=-2)


def take_turns(parts: Parts) -> np.ndarray:
    """Rows of gpt-oss take turns, and its kernels lie as [in, out]; biases have no such axis."""
    count, _, *width = parts[0].shape
    rows = np.stack(parts, axis=2).reshape(count, -1, *width)
    return rows.swapaxes(1, 2) if width else rows


def in_out(parts: Parts) -> np.ndarray:
    """Kernels of Llama 4's experts, which lie as [in, out]."""
    return behind_each_other(parts).swapaxes(-1, -2)


def keys_and_values(parts: Parts) -> np.ndarray:
    """What makes keys and values of a latent, head by head: [H * (K + V), rank].

    The keys' part lies as [H, rank, K] in GGUF, that of values as [H, V, rank].
    """
    keys, values = parts
    return np.concatenate((keys.swapaxes(1, 2), values), axis=1).reshape(-1, values.shape[-1])


def by_key_head(sizes: Recurrent) -> Callable[[Parts], np.ndarray]:
    """Queries, keys, values and gates of Qwen3-Next, which lie by heads of keys.

    Hugging Face   q0 k0 v0 z0 q1 k1 v1 z1        GGUF   q0 q1 k0 k1 v0 v1   and   z0 z1
    """

    def make(parts: Parts) -> np.ndarray:
        joint, gates = parts
        queries, keys, values = np.split(joint, (sizes.num_keys, 2 * sizes.num_keys))
        of_heads = [
            one.reshape(sizes.num_key_heads, -1, joint.shape[-1])
            for one in (queries, keys, values, gates)
        ]
        return np.concatenate(of_heads, axis=1).reshape(-1, joint.shape[-1])

    return make
