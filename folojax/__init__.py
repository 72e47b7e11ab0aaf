"""folojax: batched language-model generation as pure JAX functions."""
