"""The tests: laws before examples, one file a module; `reference` is Hugging Face transformers."""
