"""What a batch needs of the sampler. Without JAX, as the parameters of requests are."""

import enum


class SamplingClass(enum.IntEnum):
    """What the most demanding row of a batch needs; static, so each has its own executable."""

    GREEDY = 0
    RANDOM = 1  # temperature
    TRUNCATED = 2  # and top-k, top-p, min-p
    EDITED = 3  # and edits of the logits
