"""Keywords of the calls of `LLM` that one method hands on to another, for type checkers."""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict


class TemplateOptions(TypedDict, total=False):
    """Of `LLM.render_chat`, which `LLM.chat` hands on."""

    chat_template: str | None
    chat_template_content_format: str
    add_generation_prompt: bool
    continue_final_message: bool
    tools: Sequence[Any] | None
    chat_template_kwargs: Mapping[str, Any] | None


class VllmOptions(TypedDict, total=False):
    """Of vLLM's calls (`folojax.requests.vllm_names`)."""

    tokenization_kwargs: None
    mm_processor_kwargs: None


class GenerateOptions(VllmOptions, total=False):
    """Likewise, of `generate`."""

    prompt_token_ids: Any


class ChatOptions(TemplateOptions, VllmOptions, total=False):
    """Of `chat`: the template's, and vLLM's."""
