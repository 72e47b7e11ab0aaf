"""A scheduler's plan to padded arrays, to calls of the device, to tokens on the host."""
