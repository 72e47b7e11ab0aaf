"""Chat templates rendered without transformers: the same texts, and the same refusals."""

from pathlib import Path
from typing import Any

import pytest

from folojax.models.files.checkpoint import open_checkpoint
from folojax.text.chat_template import render_usual
from folojax.text.tokenizer import Tokenizer
from folojax.text.tokenizer_files import LazyTokenizer, load_tokenizer
from tests.letters import make_letters_tokenizer

USER = {"role": "user", "content": "Grüße <b> \U0001f642 'quoted' \"so\""}
CHATS: list[list[dict[str, Any]]] = [
    [USER],
    [{"role": "system", "content": "Be brief."}, USER],
    [USER, {"role": "assistant", "content": " Well.\n"}, {"role": "user", "content": ""}],
    [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "2"}]}],
]
CHATML = """{% for message in messages %}{% if loop.first and message['role'] != 'system' %}
{{ '<|im_start|>system\\n' }}{% endif %}
{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}
{% endfor %}
{% if add_generation_prompt %}
    {{ '<|im_start|>assistant\n' }}
{% endif %}"""
TEMPLATES = [
    CHATML,
    "{{ bos_token }}|{{ eos_token }}|{{ unk_token }}|{{ pad_token }}|{{ sep_token }}|{{ tools }}",
    "{{ documents is none }}{{ messages | tojson }}{{ messages | tojson(indent=2) }}",
    "{% set box = namespace(n=0) %}{% for m in messages %}{% set box.n = box.n + 1 %}{% endfor %}"
    "{{ box.n }}{{ dict(a=1) | tojson(sort_keys=true) }}{{ dict.fromkeys('ab', 1) }}",
    "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "{{ strftime_now('%Y') }}{{ range(3) | list }}{{ 'x' is string }}{{ undefined_name }}",
]
WRONG = [
    "{{ raise_exception('no') }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.append(1) }}",
    "{% set box = namespace(__class__=1) %}",
    "{% set box = namespace() %}{% set box._x = 1 %}",
    "{{ dict.mro() }}",
    "{% for i in range(10**9) %}{% endfor %}",
    "{{ 1 / 0 }}",
    "{{ messages[5].content.x }}",
]


@pytest.fixture(scope="module")
def hf() -> Any:
    return make_letters_tokenizer()


@pytest.mark.parametrize("messages", CHATS, ids=["one", "system", "three", "parts"])
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("is_prompted", [True, False])
def test_texts_are_those_of_transformers(
    hf: Any, template: str, messages: list[dict[str, Any]], is_prompted: bool
) -> None:
    def with_transformers() -> str:
        return hf.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=is_prompted
        )

    def ours() -> str | None:
        options = {"add_generation_prompt": is_prompted}
        return render_usual(template, messages, hf.special_tokens_map, options)

    if template == CHATML and isinstance(messages[0]["content"], list):
        for render in (with_transformers, ours):
            with pytest.raises(TypeError, match="concatenate"):
                render()
    else:
        assert ours() == with_transformers()


@pytest.mark.parametrize("template", WRONG)
def test_what_transformers_refuses_is_refused(hf: Any, template: str) -> None:
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        hf.apply_chat_template([USER], chat_template=template, tokenize=False)
    with pytest.raises(type(theirs.value)):
        render_usual(template, [USER], hf.special_tokens_map, {})


@pytest.mark.parametrize(
    ("messages", "options"),
    [
        ([], {}),
        ([USER | {"name": "Ada"}], {}),
        ([{"role": "assistant", "content": None}], {}),
        ([{"role": "assistant", "tool_calls": []}], {}),
        ([{"role": "tool", "content": {"degrees": 5}}], {}),
        ([USER], {"tools": []}),
        ([USER], {"enable_thinking": False}),
        ([USER], {"continue_final_message": True}),
    ],
)
def test_the_unusual_is_left_to_transformers(
    messages: list[dict[str, Any]], options: dict[str, Any]
) -> None:
    assert render_usual(CHATML, messages, {}, options) is None


@pytest.mark.parametrize("template", ["{% generation %}x{% endgeneration %}", "{% for %}", "{{ "])
def test_other_languages_are_left_to_transformers(template: str) -> None:
    assert render_usual(template, [USER], {}, {}) is None


def test_variables_reach_a_template_through_transformers(tmp_path: Path) -> None:
    make_letters_tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    template = "{{ is_loud }}{{ tools is none }}"
    assert tokenizer.render_chat([USER], template, is_loud=False) == "FalseTrue"
    assert tokenizer.render_chat([USER], template, is_loud=False, tools=[]) == "FalseFalse"


@pytest.mark.parametrize("is_prompted", [True, False])
def test_the_packaged_template(is_prompted: bool) -> None:
    tokenizer = load_tokenizer(open_checkpoint(None).directory)
    assert isinstance(tokenizer, LazyTokenizer)
    assert tokenizer.has_chat_template
    texts = [tokenizer.render_chat(one, add_generation_prompt=is_prompted) for one in CHATS]
    assert tokenizer._load is not None  # transformers was not needed
    whole = Tokenizer(tokenizer.hf)
    assert texts == [whole.render_chat(one, add_generation_prompt=is_prompted) for one in CHATS]


@pytest.mark.parametrize("is_kept", [False, True], ids=["plain", "kept"])
def test_the_template_that_transformers_would_take(
    tmp_path: Path, is_kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file before the config; one of several by its name."""
    from transformers import AutoTokenizer

    monkeypatch.setenv("FOLOJAX_CACHE_DIR", str(tmp_path / "cache"))
    directory = tmp_path / "model"
    tokenizer = make_letters_tokenizer()
    if is_kept:
        tokenizer.init_kwargs["extra"] = 1  # which makes it more than plain
    tokenizer.save_pretrained(directory, save_jinja_files=False)

    def check(has_template: bool = True, **options: Any) -> None:
        theirs = AutoTokenizer.from_pretrained(directory)
        load_tokenizer(directory)
        ours = load_tokenizer(directory)
        assert isinstance(ours, LazyTokenizer)
        assert ours.has_chat_template is has_template
        if has_template:
            text = ours.render_chat([USER], **options)
            assert text == theirs.apply_chat_template([USER], tokenize=False, **options)
        assert ours.hf.special_tokens_map == theirs.special_tokens_map
        assert ours._roles.special_tokens == theirs.special_tokens_map

    check()
    (directory / "chat_template.jinja").write_text("{{ eos_token }}of the file\n")
    check()
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "other.jinja").write_text("other")
    check()
    check(chat_template="other")
    check(chat_template="{{ bos_token }}own")
    (directory / "additional_chat_templates" / "other.jinja").write_text("changed")
    check(chat_template="other")
