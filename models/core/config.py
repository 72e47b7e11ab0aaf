"""What a decoder looks like: checked and hashable, whatever family it comes from."""

import dataclasses
import math
from typing import Any, Literal, get_args

from folojax.models.core.interface import Scoring
from folojax.models.core.recurrent import Recurrent
from folojax.models.core.rope import RopeScaling

# No model comes near these; a config beyond them is a mistake or malice, and its shapes alone
# would fill the memory.
_MOST_WIDTH, _MOST_LAYERS = 2**26, 2**10
_OPTIONAL = (
    "peers",
    *("shared_expert_size", "kv_rank", "query_rank", "value_dim"),
    *("full_head_dim", "full_kv_heads", "layer_embed_size", "layer_embed_vocab", "expert_latent"),
    *("side_streams", "bypass_rank"),
)
_COUNTED_LIKE_LAYERS = ("num_layers", "num_experts", "num_experts_per_token")

Activation = Literal["silu", "gelu", "gelu_tanh", "relu2", "xielu"]
Norm = Literal["rms", "rms_wide", "rms_offset", "layer", "layer_offset", "layer_plain"]

Router = Literal["softmax", "softmax_corrected", "sigmoid", "sigmoid_of_input"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture of one model; hashable, so it is static under `jax.jit`.

    The defaults are Llama's; a family states where it differs.

    Raises:
        ValueError: a number is out of range, or two of them cannot go together; all are listed.
    """

    architecture: str = "LlamaForCausalLM"  # key of `folojax.models.families.families.FAMILIES`
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    """Longest sequence the model was made for, in tokens (`max_position_embeddings`)."""
    rope_theta: float
    rope_scaling: RopeScaling | None
    rms_norm_eps: float  # of every norm, LayerNorm included
    tie_embeddings: bool  # the output projection is the embedding; no `lm_head` exists
    qkv_bias: bool
    qk_norm: bool
    """Queries and keys pass an RMS norm before the rotary embedding, over head_dim by default."""

    is_qk_norm_joint: bool = False  # that norm is over all heads at once
    is_qk_norm_late: bool = False  # and comes after the rotary embedding
    o_bias: bool = False
    mlp_bias: bool = False

    norm: Norm = "rms"
    """"rms": rounded, then times the weight; "rms_wide": times the weight, then rounded;
    "rms_offset": the same with 1 + weight; "layer": LayerNorm with a bias;
    "layer_offset": the same with 1 + weight; "layer_plain": without a bias."""
    has_pre_norm: bool = True  # attention and MLP read a normed residual stream
    has_post_norm: bool = False  # what they return is normed before it is added
    is_parallel: bool = False  # the MLP reads what attention reads, before its sum
    activation: Activation = "silu"
    is_gated: bool = True  # the MLP is act(gate) * up; else act(up)

    kv_rank: int = 0
    """Keys and values of all heads come from one latent so wide; beside it lies the part of keys
    that turns, the same for all heads (`folojax.models.core.latent`). 0: each head has its own."""
    query_rank: int = 0  # the width of the latent that queries come from then; 0: there is none
    value_dim: int = 0  # of a value then, up to head_dim

    full_head_dim: int = 0  # of layers without a window; 0: as the others
    full_kv_heads: int = 0  # likewise
    has_keys_as_values: bool = False
    """In layers without a window values are what keys are before their norm."""
    has_value_norm: bool = False  # values pass an RMS norm without a weight
    kv_layers: tuple[int, ...] = ()
    """By layer: whose keys and values it attends to, its own or those of the last layer of its kind
    (with or without a window) that has some; () is its own, everywhere."""

    has_learned_positions: bool = False
    """A table of positions is added to the embedding; there is no rotary embedding."""
    rotary_dim: int | None = None  # leading dimensions of a head that rotate; None: all
    is_rope_interleaved: bool = False  # dimension 2r turns with 2r + 1, not r with r + D/2
    ropeless_layers: tuple[int, ...] = ()  # layers without rotary embedding
    mixerless_layers: tuple[int, ...] = ()  # without attention and recurrence: an MLP alone
    mlpless_layers: tuple[int, ...] = ()  # without an MLP
    windows: tuple[int | None, ...] = ()
    """By layer: how many tokens it sees, its own included; None: all. () is all, everywhere."""
    local_rope_theta: float | None = None
    """Of layers with a window, which have no rotary scaling then; None: as the others."""

    attention_scale: float | None = None  # multiplies scores; None: 1 / sqrt(head_dim)
    query_growth: float | None = None
    """Queries at position p are multiplied by 1 + growth * log(1 + p // query_growth_length)."""
    query_growth_length: int = 1
    is_growth_ropeless: bool = False
    """Only in layers without rotary embedding, and by p + 1."""
    has_bare_qk_norm: bool = False
    """Where queries and keys turn, they pass an RMS norm without a weight afterwards."""
    attention_chunk: int | None = None
    """Tokens see those of their chunk of so many positions in `chunked_layers`, counted from 0."""
    chunked_layers: tuple[int, ...] = ()
    attention_softcap: float | None = None  # scores become cap * tanh(scores / cap)
    has_sinks: bool = False  # each head has a score beside those of its keys, for nothing
    has_attention_gate: bool = False
    """What a head returns is multiplied by the sigmoid of a gate, which comes with its query."""
    recurrent: Recurrent | None = None  # layers without attention, and what they have instead
    logits_softcap: float | None = None
    embed_scale: float = 1.0
    residual_scale: float = 1.0  # multiplies what attention and MLP add to the residual stream
    attention_out_scale: float = 1.0  # multiplies what attention alone adds,
    mlp_scale: float = 1.0  # and what an MLP does,
    gate_scale: float = 1.0  # and its gates
    logits_divisor: float = 1.0
    layer_embed_size: int = 0
    """Width of an embedding that each layer has of its own, which gates what the layer adds last;
    0: there is none."""
    layer_embed_vocab: int = 0  # tokens that it tells apart
    has_layer_scale: bool = False  # a layer's stream is multiplied by a number of its own
    side_streams: int = 0
    """Residual streams beside the one that attention and MLPs read
    (`folojax.models.core.side_streams`)."""
    bypass_rank: int = 0
    """What attention reads is added to what it returns, and so is a product of it of so low a rank
    (LAuReL); both streams count half. 0: there is none."""
    gate_cutoffs: tuple[float | None, ...] = ()
    """By layer: an MLP's gates are counted from their mean and so many standard deviations on, and
    are 0 below; None: they are what they are. () is that, everywhere."""

    num_experts: int = 0  # 0: every MLP is dense
    num_experts_per_token: int = 0
    expert_latent: int = 0  # width of what experts read and return; 0: that of the stream
    expert_size: int = 0  # inner width of an expert, as `intermediate_size` is of a dense MLP
    is_expert_weight_normed: bool = True  # the weights of a token's experts sum to 1
    expert_scale: float = 1.0  # multiplies these weights
    router: Router = "softmax"
    """"sigmoid": of each score, plus a correction where experts are chosen and not in weights;
    "softmax_corrected": of all scores, with one; "sigmoid_of_input": without, and it multiplies
    what an expert reads, not what it returns."""
    num_expert_groups: int = 1  # equal ones, of which a token's experts come from the best few:
    num_groups_per_token: int = 1
    num_best_of_group: int = 2  # experts whose sum says how good a group is
    shared_expert_size: int = 0  # inner width of an expert that every token passes
    has_expert_bias: bool = False  # experts and their router have biases
    swiglu_limit: float | None = None
    """Experts return (up + 1) * gate * sigmoid(alpha * gate) of clamped values, gates and what they
    gate in turn; None: as dense MLPs do."""
    swiglu_alpha: float = 1.0
    has_shared_gate: bool = False  # it is multiplied by the sigmoid of a score of its own
    dense_layers: tuple[int, ...] = ()  # layers with a dense MLP in a model of experts
    has_dense_beside: bool = False
    """Beside its experts a layer has the dense MLP; both read and return by norms of their own, and
    the router reads the stream itself, normed and scaled."""
    intermediate_sizes: tuple[int, ...] = ()  # by layer, where dense MLPs differ; (): they do not

    num_shards: int = 1
    """Of how many devices this is one: heads, inner widths and kernels are its part of the model
    (`folojax.models.core.shards`)."""
    peers: int = 0
    """GPUs, a bit each by their number in the process, that read each other's parts of a sum
    (`folojax.models.core.peer_sum`); 0: XLA sums."""

    is_ordered: bool = False
    """Sums over a row's numbers have an order of their own on NVIDIA GPUs, whatever the batch."""

    hf_config: str = dataclasses.field(default="", compare=False, repr=False)
    """The config.json that all this was read from, for `save_pretrained`."""

    def scoring(self, layer: int) -> Scoring:
        """What a layer's attention does with its scores."""
        return Scoring(
            scale=self.attention_scale,
            softcap=self.attention_softcap,
            window=self.windows[layer] if self.windows else None,
            has_sinks=self.has_sinks,
            value_dim=self.kv_rank or None,
            chunk=self.attention_chunk if layer in self.chunked_layers else None,
        )

    @property
    def key_dim(self) -> int:
        """Numbers of a key as attention sees it: of a head, or of a latent and what turns."""
        return self.kv_rank + (self.rotary_dim or 0) if self.kv_rank else self.head_dim

    def is_recurrent(self, layer: int) -> bool:
        """Whether the layer keeps a state."""
        return self.recurrent is not None and layer in self.recurrent.layers

    def has_pages(self, layer: int) -> bool:
        """Whether the layer has attention."""
        is_beside = self.recurrent is not None and self.recurrent.is_beside
        has_attention = is_beside or not self.is_recurrent(layer)
        return has_attention and layer not in self.mixerless_layers

    def at(self, layer: int) -> "ModelConfig":
        """The same with the sizes that the layer has, where layers differ in these."""
        is_full = not self.windows or self.windows[layer] is None
        changes: dict[str, Any] = {}
        if is_full:
            changes |= {"head_dim": self.full_head_dim, "num_kv_heads": self.full_kv_heads}
        elif self.has_keys_as_values:
            changes["has_keys_as_values"] = False
        if self.intermediate_sizes:
            changes["intermediate_size"] = self.intermediate_sizes[layer]
        changes = {
            name: value for name, value in changes.items() if value or name.startswith("has_")
        }
        return dataclasses.replace(self, **changes, intermediate_sizes=()) if changes else self

    def heads_in(self, name: str) -> tuple[int, ...]:
        """Heads of all that `qkv` or `qk` joins: in a layer they are equally wide."""
        queries = self.num_heads * (2 if self.has_attention_gate else 1)
        if name.startswith("qkv"):
            return queries, self.num_kv_heads, self.num_kv_heads
        return queries, self.full_kv_heads or self.num_kv_heads

    def kv_layer(self, layer: int) -> int:
        """Whose keys and values a layer attends to."""
        return self.kv_layers[layer] if self.kv_layers else layer

    def lends(self, layer: int) -> bool:
        """Whether later layers attend to a layer's keys and values."""
        return layer in self.kv_layers[layer + 1 :]

    def kind(self, layer: int) -> tuple[Any, ...]:
        """All that tells a layer from others of the model."""
        return (
            *(self.scoring(layer), self.is_sparse(layer), self.is_recurrent(layer)),
            *(self.at(layer), self.kv_layer(layer) == layer, self.lends(layer)),
            *(layer in self.mixerless_layers, layer in self.mlpless_layers),
            self.gate_cutoff(layer),
        )

    def gate_cutoff(self, layer: int) -> float | None:
        """How many standard deviations above their mean a layer's gates begin, if they do."""
        return self.gate_cutoffs[layer] if self.gate_cutoffs else None

    @property
    def is_qk_norm_plain(self) -> bool:
        """Whether queries and keys are normed and then rotated in the way of most families."""
        is_normed = self.qk_norm and self.norm == "rms"
        is_other = self.is_qk_norm_joint or self.is_qk_norm_late or self.query_growth is not None
        is_other = (
            is_other or self.has_bare_qk_norm or self.has_value_norm or self.has_keys_as_values
        )
        return is_normed and not (is_other or self.rotary_dim or self.is_rope_interleaved)

    @property
    def has_router_correction(self) -> bool:
        """Whether experts are chosen by scores that have a correction."""
        return self.router in ("sigmoid", "softmax_corrected")

    @property
    def has_norm_bias(self) -> bool:
        """Whether norms have biases."""
        return self.norm in ("layer", "layer_offset")

    def is_sparse(self, layer: int) -> bool:
        """Whether the layer's MLP is a mixture of experts."""
        return self.num_experts > 0 and layer not in self.dense_layers

    def __post_init__(self) -> None:
        problems = self._bad_numbers() or self._misfits()
        if problems:
            raise ValueError("model config: " + "; ".join(problems))

    def _bad_numbers(self) -> list[str]:
        """Sizes that are no sizes, and factors that are NaN or not above zero."""
        found = []
        for field in dataclasses.fields(self):
            value: Any = getattr(self, field.name)
            # bool is an int to Python, but `num_layers: true` in a config is a mistake.
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if field.type is int:
                most = _MOST_LAYERS if field.name in _COUNTED_LIKE_LAYERS else _MOST_WIDTH
                # Counts of experts may be 0 where there are none.
                is_optional = not self.num_experts or field.name in _OPTIONAL
                least = 0 if field.default == 0 and is_optional else 1
                if not is_number or isinstance(value, float) or not least <= value <= most:
                    found.append(
                        f"{field.name} is {value!r}; it must be an integer from {least} to {most:,}"
                    )
            is_unset = field.type == (float | None) and value is None
            is_factor = field.type in (float, float | None) and not is_unset
            if is_factor and not (is_number and 0 < value < math.inf):
                found.append(f"{field.name} is {value!r}; it must be a finite number above 0")
        return found

    def _misfits(self) -> list[str]:
        """Sizes that cannot go together, and names of nothing."""
        found = []
        if self.num_heads % self.num_kv_heads:
            found.append(
                f"num_heads is {self.num_heads}, not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            found.append(f"head_dim is {self.head_dim}; rotary embeddings need it even")
        turning = self.head_dim if self.rotary_dim is None else self.rotary_dim
        if turning % 2 or not 2 <= turning <= self.head_dim:
            found.append(f"rotary_dim is {turning}; it must be even, and at most {self.head_dim}")
        for name in ("windows", "intermediate_sizes", "gate_cutoffs"):
            count = len(getattr(self, name))
            if count and count < self.num_layers:
                found.append(f"{name} are given for {count} of {self.num_layers} layers")
        for window in (*self.windows, self.attention_chunk):
            if window is not None and (not isinstance(window, int) or window < 1):
                found.append(
                    f"a layer's window or chunk is {window!r}; it must be an integer of at least 1"
                )
                break
        if self.kv_layers and any(self.kv_layers[i] > i for i in range(self.num_layers)):
            found.append(f"kv_layers are {self.kv_layers}; none may be behind the layer itself")
        if not any(map(self.has_pages, range(self.num_layers))):
            found.append("no layer has attention; at least one must")
        if set(self.mixerless_layers) & set(self.mlpless_layers):
            found.append("layers have neither attention nor an MLP")
        if self.num_experts_per_token > self.num_experts:
            found.append(
                f"num_experts_per_token is {self.num_experts_per_token}, of {self.num_experts}"
            )
        if self.kv_rank and not (0 < self.value_dim <= self.head_dim and self.rotary_dim):
            found.append(f"value_dim is {self.value_dim}; it must be from 1 to {self.head_dim}")
        if self.kv_rank and self.num_kv_heads != 1:
            found.append(f"num_kv_heads is {self.num_kv_heads}; heads of one latent share one key")
        size, rest = divmod(self.num_experts, self.num_expert_groups)
        few = self.num_groups_per_token
        is_grouped = self.num_expert_groups > 1
        if is_grouped and (
            rest
            or few > self.num_expert_groups
            or size < self.num_best_of_group
            or few * size < self.num_experts_per_token
        ):
            found.append(
                f"{self.num_experts} experts in {self.num_expert_groups} groups, {few} for a token"
            )
        for name, kind in (("norm", Norm), ("activation", Activation), ("router", Router)):
            if getattr(self, name) not in get_args(kind):
                options = ", ".join(get_args(kind))
                found.append(f"{name} is {getattr(self, name)!r}, not one of {options}")
        return found
