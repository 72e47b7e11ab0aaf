"""The forms of a prompt, where vLLM has them."""

from folojax.requests.prompts import Prompt, TextPrompt, TokensPrompt

__all__ = ["Prompt", "TextPrompt", "TokensPrompt"]
