"""Sampling parameters, where vLLM has them."""

from folojax.requests.sampling_params import SamplingParams

__all__ = ["SamplingParams"]
