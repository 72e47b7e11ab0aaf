"""Messages whose content is a list of parts."""

from typing import Any

import pytest

from folojax import LLM, SamplingParams
from folojax.models.files.checkpoint import open_checkpoint
from folojax.text.tokenizer import Tokenizer
from folojax.text.tokenizer_files import load_tokenizer
from tests.jsonl_runs import entries, run
from tests.letters import make_letters_tokenizer

HI = [{"type": "text", "text": "hi"}]
TWO = [{"type": "text", "text": " one"}, {"type": "text", "text": "two "}]

PRINTING = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
TRIMMING = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}"
ADDING = "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% endfor %}"
WALKING = """{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}\
{% else %}{% for part in m.content %}[{{ part.text }}]{% endfor %}{% endif %}{% endfor %}"""
STRINGS_ONLY = """{% for m in messages %}{% if m.content is string %}{% set c = m.content %}\
{% else %}{% set c = '' %}{% endif %}<{{ m.role }}>{{ c }}{% endfor %}"""
FIRST_SYSTEM = """{% set system = messages[0].content.strip() %}\
{{ system }}|{{ messages[-1].content }}"""
DUMPING = "{% for m in messages %}<{{ m.role }}>{{ m.content | tojson }}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(make_letters_tokenizer())


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize("template", [PRINTING, ADDING, STRINGS_ONLY])
def test_parts_are_joined_where_a_template_knows_none(tokenizer: Tokenizer, template: str) -> None:
    """As in vllm 9358: neither Python's repr in the prompt, nor an error, nor nothing."""
    assert tokenizer.render_chat(user(HI), template) == "<user>hi"
    assert tokenizer.render_chat(user(TWO), template) == "<user> one\ntwo "
    assert tokenizer.render_chat(user(("hi", *TWO)), template) == "<user>hi\n one\ntwo "
    assert tokenizer.render_chat(user([]), template) == "<user>"


def test_parts_are_joined_before_they_are_trimmed_or_kept(tokenizer: Tokenizer) -> None:
    assert tokenizer.render_chat(user(TWO), TRIMMING) == "<user>one\ntwo"
    messages = [{"role": "system", "content": TWO}, *user(HI)]
    assert tokenizer.render_chat(messages, FIRST_SYSTEM) == "one\ntwo|hi"
    assert tokenizer.render_chat(user(HI), DUMPING) == '<user>"hi"'


def test_a_template_that_walks_parts_gets_them(tokenizer: Tokenizer) -> None:
    assert tokenizer.render_chat(user(HI), WALKING) == "<user>[hi]"
    assert tokenizer.render_chat(user(TWO), WALKING) == "<user>[ one][two ]"
    assert tokenizer.render_chat(user(["hi"]), WALKING) == "<user>[hi]"
    messages = [*user("text"), {"role": "assistant", "content": TWO}]
    assert tokenizer.render_chat(messages, WALKING) == "<user>text<assistant>[ one][two ]"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"type": "image_url", "image_url": {}}], "message 1 has a part of type 'image_url' at 0"),
        ([*HI, {"type": "input_audio"}], "message 1 has a part of type 'input_audio' at 1"),
        ([{"type": "text"}], "message 1 has a part without text"),
        ([{"type": "text", "text": 5}], "message 1 has a part without text"),
        ([5], "message 1 has a int at 0"),
        (5, "message 1 has content that is a int: 5"),
        ({"text": "hi"}, "message 1 has content that is a dict"),
        (b"hi", "message 1 has content that is a bytes"),
    ],
)
def test_other_content_is_refused_by_name(tokenizer: Tokenizer, content: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenizer.render_chat([*user("x"), *user(content)], WALKING)


def test_what_tools_call_and_return_is_left_alone(tokenizer: Tokenizer) -> None:
    call = {"role": "assistant", "tool_calls": [{"name": "f"}]}
    result: dict[str, Any] = {"role": "tool", "content": [{"degrees": 5}]}
    template = "{{ 'content' in messages[0] }}{{ messages[1].content | tojson }}"
    assert tokenizer.render_chat([call, result], template) == 'False[{"degrees": 5}]'
    result["content"] = {"degrees": 5}
    assert tokenizer.render_chat([call, result], template) == 'False{"degrees": 5}'
    messages = [{"role": "assistant", "content": None, "tool_calls": []}, *user(HI)]
    assert tokenizer.render_chat(messages, "{{ messages[0].content or '' }}|") == "|"


def test_the_packaged_template_reads_parts_as_text() -> None:
    tokenizer = load_tokenizer(open_checkpoint(None).directory)
    options: dict[str, Any] = {"add_generation_prompt": True}
    wanted = tokenizer.render_chat(user("hi"), **options)
    assert tokenizer.render_chat(user(HI), **options) == wanted
    assert "'text'" not in wanted


def test_a_final_message_of_parts_is_gone_on_with(tokenizer: Tokenizer) -> None:
    messages = [*user("hi"), {"role": "assistant", "content": [{"type": "text", "text": "Well"}]}]
    for template in (PRINTING, WALKING.replace("[", "").replace("]", "")):
        options: dict[str, Any] = {"continue_final_message": True, "add_generation_prompt": False}
        text = tokenizer.render_chat(messages, template, **options)
        assert text == "<user>hi<assistant>Well"


def test_parts_in_a_chat_and_in_a_line_of_a_job(letters_llm: LLM, target: Any) -> None:
    params = SamplingParams(temperature=0, max_tokens=2)
    (expected,) = letters_llm.chat(user("hi"), params, use_tqdm=False)
    (output,) = letters_llm.chat(user(HI), params, use_tqdm=False)
    assert output.prompt == expected.prompt == "[user]hi|[assistant]"
    with pytest.raises(ValueError, match="conversation 1: message 0 has a part of type 'image'"):
        letters_llm.chat([user(HI), user([{"type": "image"}])], params, use_tqdm=False)
    lines = [
        b'{"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}\n',
        b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}\n',
    ]
    run(lines, target, llm=letters_llm, defaults=params)
    done, refused = entries(target)
    assert done["outputs"][0]["token_ids"] == expected.outputs[0].token_ids
    assert "message 0 has a part of type 'image'" in refused["error"]
