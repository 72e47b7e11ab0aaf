"""The quantisations that there are. Without JAX, as the options of an engine are."""

QUANTIZATIONS = ("int8", "int4", "fp8")
"""What an engine may be asked for."""

TILED = "int4 in tiles"
"""What "int4" is on an NVIDIA GPU: codes lie as its kernel reads them."""
