"""The call of `LLM` that makes prompts of conversations."""

from collections.abc import Mapping, Sequence
from typing import Any

from folojax.engine.searches import Searches
from folojax.engine.shared_engine import exclusive
from folojax.requests.prompts import Prompt


class ChatPrompts(Searches):
    """The part of `LLM` that renders chat templates."""

    @exclusive
    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        chat_template_content_format: str = "auto",
    ) -> Prompt:
        """The prompt of one conversation, as `generate` takes it: what `chat` would continue.

        Args:
            messages: Each has "role" and "content".
            chat_template: Jinja text in place of the tokenizer's own.
            add_generation_prompt: Opens the assistant's turn.
            continue_final_message: Leaves the last message open, to be gone on with; then
                `add_generation_prompt` must be False.
            tools: Functions or JSON schemas, for templates that know them.
            chat_template_kwargs: Further variables of the template.
            chat_template_content_format: "string" joins contents that are lists of parts, "openai"
                gives the template parts always; "auto" tries out what it knows.

        Raises:
            ValueError: there is no tokenizer or no template, or it fails.
        """
        tokenizer = self.engine.tokenizer
        if tokenizer is None:
            raise ValueError("chat needs a tokenizer: pass tokenizer=, or generate from token ids")
        text = tokenizer.render_chat(
            messages,
            chat_template,
            chat_template_content_format,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            **(chat_template_kwargs or {}),
        )
        # The template writes the special tokens itself: adding them would double them.
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        return {"prompt": text, "prompt_token_ids": token_ids}

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` needs no template to be given."""
        return self.engine.tokenizer is not None and self.engine.tokenizer.has_chat_template
