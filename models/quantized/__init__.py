"""Kernels of four and eight bits and the products with them."""
