"""Logits to tokens, and what is known of how they were drawn."""
