"""The quantisations that there are. Without JAX, as the options of an engine are."""

QUANTIZATIONS = ("int8", "int4")
