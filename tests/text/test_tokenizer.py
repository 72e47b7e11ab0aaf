"""What the engine asks of a tokenizer."""

import time
from pathlib import Path
from typing import Any

import pytest

from folojax.models.files.checkpoint import open_checkpoint
from folojax.text import tokenizer
from folojax.text.tokenizer import Tokenizer
from folojax.text.tokenizer_files import load_tokenizer
from tests.letters import make_metaspace_tokenizer


@pytest.fixture(scope="module")
def embedded() -> Tokenizer:
    return load_tokenizer(open_checkpoint(None).directory)


def test_a_chat_is_rendered_with_its_special_tokens_once(embedded: Tokenizer) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = embedded.render_chat(messages, add_generation_prompt=True)
    assert text == embedded.hf.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert text.count("Be brief.") == text.count("Hi") == 1
    own = "{{ bos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %}"
    text = embedded.render_chat(messages, own)
    assert text == f"{embedded.hf.bos_token}[Be brief.][Hi]"


def test_a_chat_without_any_template_is_refused() -> None:
    class Bare:
        chat_template = None

    with pytest.raises(ValueError, match="no chat template: pass chat_template="):
        Tokenizer(Bare()).render_chat([{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize(
    ("messages", "template", "message"),
    [
        ([{"content": "x"}], None, "messages holds"),
        (["x"], None, "messages holds 'x'"),
        ([{"role": "user"}], "{{ messages[0].content.x.y }}", "template failed"),
        ([{"role": "user", "content": "x"}], "{{ ", "template failed"),
        ([{"role": "user", "content": "x"}], "{{ 1 / 0 }}", "template failed"),
        ([{"role": "user", "content": "x"}], "{{ raise_exception('no') }}", "template failed: no"),
        ([{"role": "user", "content": "x"}], "{% for i in range(10**9) %}{% endfor %}", "failed"),
        ([{"role": "user", "content": "x"}], "{{ ''.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_a_chat_that_cannot_be_rendered_is_refused(
    embedded: Tokenizer, messages: Any, template: str | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        embedded.render_chat(messages, template)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    ],
    ids=["silent", "loud", "recursive"],
)
def test_a_template_that_loops_fails_in_bounded_time(
    embedded: Tokenizer, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "_TEMPLATE_SECONDS", 0.3)
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"template failed: it took longer than 0\.3 s"):
        embedded.render_chat([{"role": "user", "content": "x"}], template)
    assert time.monotonic() - start < 10


def test_a_directory_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no tokenizer could be loaded from") as info:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(info.value)


def test_special_tokens_are_known_by_id(embedded: Tokenizer) -> None:
    assert embedded.hf.eos_token_id in embedded.special_ids
    for id_ in sorted(embedded.special_ids):
        assert embedded.decode([id_]) == ""
        assert embedded.token_text(id_) == embedded.hf.convert_ids_to_tokens(id_)
    assert not embedded.special_ids & set(embedded.encode("The sea is <here>"))


def test_only_a_vocabulary_that_falls_back_to_bytes_has_byte_tokens(embedded: Tokenizer) -> None:
    assert embedded.byte_values == {}
    metaspace = make_metaspace_tokenizer()
    assert sorted(metaspace.byte_values.values()) == list(range(256))
    ids = {byte: id_ for id_, byte in metaspace.byte_values.items()}
    assert metaspace.decode([ids[byte] for byte in "中".encode()]) == "中"


def test_the_number_of_tokens_covers_every_id(embedded: Tokenizer) -> None:
    assert embedded.num_tokens == len(embedded.hf) == 49152


def test_spaces_between_special_tokens_reach_a_tokenizer_that_writes_them(tmp_path: Path) -> None:
    """Of the tokenizers of transformers, those of speech models do."""
    from transformers import Wav2Vec2CTCTokenizer

    path = tmp_path / "vocab.json"
    path.write_text('{"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "A": 5, "B": 6}')
    tokenizer = Tokenizer(Wav2Vec2CTCTokenizer(str(path)))
    assert tokenizer.decode([5, 6, 5], spaces_between_special_tokens=True) == "A B A"
    assert tokenizer.decode([5, 6, 5], spaces_between_special_tokens=False) == "ABA"
