"""What a workload needs of a model: floating-point operations and bytes, nothing wasted.

A multiplication with its addition is two operations. Only matrix products count, those of attention
included; norms, activations and sampling are small beside them.
"""

from collections.abc import Sequence

from bench_workloads import Workload

from folojax.models.core.config import ModelConfig

Product = tuple[int, int]
"""Width in, width out."""


def layer_products(config: ModelConfig, layer: int) -> list[Product]:
    """The products of one token in a layer, attention's own aside."""
    width = config.hidden_size
    heads = config.num_heads * config.head_dim
    kv_heads = config.num_kv_heads * config.head_dim
    products = [(width, heads + 2 * kv_heads), (heads, width)]
    if config.is_sparse(layer):
        inner = config.expert_size
        expert = [(width, 2 * inner), (inner, width)]
        return [*products, (width, config.num_experts), *config.num_experts_per_token * expert]
    inner = config.intermediate_size
    return [*products, (width, (2 if config.is_gated else 1) * inner), (inner, width)]


def head_product(config: ModelConfig) -> Product:
    """From a hidden state to logits."""
    return config.hidden_size, config.vocab_size


def num_weights(products: Sequence[Product]) -> int:
    """Of their matrices."""
    return sum(inner * outer for inner, outer in products)


def token_flops(config: ModelConfig) -> int:
    """Of one token in all layers, attention and head aside."""
    layers = (layer_products(config, layer) for layer in range(config.num_layers))
    return 2 * sum(num_weights(products) for products in layers)


def attention_flops(config: ModelConfig, start: int, stop: int) -> int:
    """Of the tokens at positions `start` ... `stop` - 1: each sees all up to itself."""
    per_pair = 4 * config.num_heads * config.head_dim
    total = 0
    for layer in range(config.num_layers):
        window = config.scoring(layer).window
        total += _num_seen(stop, window) - _num_seen(start, window)
    return per_pair * total


def _num_seen(stop: int, window: int | None) -> int:
    """Tokens seen by those at positions 0 ... `stop` - 1, in all."""
    full = stop if window is None else min(stop, window)
    return full * (full + 1) // 2 + (stop - full) * (window or 0)


def workload_flops(config: ModelConfig, workload: Workload) -> int:
    """Of a workload: each prompt once, and what its samples need beyond.

    The last token of a sample is never computed; logits are needed once after the prompt, and after
    every other token of a sample.
    """
    per_token, per_logits = token_flops(config), 2 * num_weights([head_product(config)])
    total = 0
    for request in workload.requests:
        prompt, end = len(request.prompt), len(request.prompt) + request.output_len - 1
        total += prompt * per_token + attention_flops(config, 0, prompt) + per_logits
        own = (end - prompt) * (per_token + per_logits) + attention_flops(config, prompt, end)
        total += request.num_samples * own
    return total


def decode_flops(config: ModelConfig, num_rows: int, position: int) -> int:
    """Of a step in which every row has a token at that position."""
    row = token_flops(config) + 2 * num_weights([head_product(config)])
    return num_rows * (row + attention_flops(config, position, position + 1))


def decode_bytes(
    config: ModelConfig, itemsize: float, kv_bytes_per_token: float, num_rows: int, position: int
) -> float:
    """That such a step has to read: every weight once, and the keys and values of each row.

    Of experts all count: many rows need most of them.

    Args:
        config: The model.
        itemsize: Bytes of a weight.
        kv_bytes_per_token: Of keys and values, in all layers.
        num_rows: Rows.
        position: Of their tokens.
    """
    weights = num_weights([head_product(config)])
    for layer in range(config.num_layers):
        products = layer_products(config, layer)
        if config.is_sparse(layer):
            expert, per_token = products[3:5], config.num_experts_per_token
            weights += (config.num_experts - per_token) * num_weights(expert)
        weights += num_weights(products)
    return weights * itemsize + num_rows * (position + 1) * kv_bytes_per_token
