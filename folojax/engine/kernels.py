"""What the log tells of an engine's layers: the kernels of attention, and recurrent layers."""

import logging

from folojax.attention import kernels_of
from folojax.kv import KVLayout
from folojax.models.core.decoder import Llama

_LOG = logging.getLogger("folojax")


def tell_kernels(module: Llama, layout: KVLayout) -> None:
    """Logs how the layers attend; a warning where an accelerator's own way does not fit."""
    layers, reasons = kernels_of(module.config, layout)
    told = (f"{name} ({len(found)} layers)" for name, found in layers.items())
    _LOG.info("attention: %s", ", ".join(told))
    if layout.recurrent_layers:
        _LOG.info(
            "%d recurrent layers; room for %d states, %d of them for the prefix cache",
            len(layout.recurrent_layers),
            layout.num_states - 1,
            layout.num_kept_states,
        )
    for reason, found in reasons.items():
        is_slow = layout.format.kernels[0] == "cudnn"
        level = logging.WARNING if is_slow else logging.INFO
        _LOG.log(level, "attention of %d layers in plain XLA, slower: %s", len(found), reason)
