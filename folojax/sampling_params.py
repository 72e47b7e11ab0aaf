"""Sampling parameters, where vLLM has them."""

from folojax.requests.beams import BeamSearchParams
from folojax.requests.sampling_params import SamplingParams
from folojax.requests.structured_outputs import StructuredOutputsParams

__all__ = ["BeamSearchParams", "SamplingParams", "StructuredOutputsParams"]
