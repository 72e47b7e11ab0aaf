"""Checkpoints of Hugging Face and GGUF, read and written."""
