"""Tokenizers that are read without transformers do what transformers' own do."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from folojax.models.files.checkpoint import open_checkpoint
from folojax.text.tokenizer import Tokenizer
from folojax.text.tokenizer_files import LazyTokenizer, load_tokenizer
from tests.letters import make_letters_tokenizer, make_metaspace_tokenizer

TEXTS = [
    "",
    " ",
    "the cat sat",
    "  two  spaces\n\n\ttab ",
    "don't we're , I'LL . go ?",
    "naïve 日本 🙂 ﬁ e\u0301",
    "<s>a</s><|endoftext|> <unk>b<extra> c",
]


def byte_vocabulary(*special: str) -> Any:
    """Ids of special tokens, of GPT-2's 256 letters and of two words, and merges."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = [*special, *sorted(ByteLevel.alphabet()), "th", "the"]
    return {token: id_ for id_, token in enumerate(tokens)}, [("t", "h"), ("th", "e")]


def gpt2() -> Any:
    from transformers import GPT2Tokenizer

    vocabulary, merges = byte_vocabulary("<|endoftext|>")
    return GPT2Tokenizer(vocabulary, merges, add_prefix_space=True)


def qwen2() -> Any:
    from transformers import Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer(*byte_vocabulary("<|endoftext|>"))
    tokenizer.add_tokens(["<extra>"])
    return tokenizer


def llama(**options: Any) -> Any:
    from transformers import LlamaTokenizer

    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens = [*special, "\u2581", "a", "b", "t", "h", "e", "\u2581a", "th", "the"]
    vocabulary = {token: id_ for id_, token in enumerate(tokens)}
    merges = [("\u2581", "a"), ("t", "h"), ("th", "e")]
    return LlamaTokenizer(vocabulary, merges, **options)


def word_pieces(**options: Any) -> Any:
    from transformers import BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s", "a", ".", "'", "t"]
    return BertTokenizer({word: id_ for id_, word in enumerate(words)}, **options)


def codegen() -> Any:
    from transformers import CodeGenTokenizer

    return CodeGenTokenizer(*byte_vocabulary("<|endoftext|>"))


def padded() -> Any:
    tokenizer = make_letters_tokenizer()
    tokenizer.backend_tokenizer.enable_padding(length=7, pad_id=0, pad_token="<pad>")
    tokenizer.backend_tokenizer.enable_truncation(3)
    return tokenizer


KINDS: dict[str, Callable[[], Any]] = {
    "letters": make_letters_tokenizer,
    "metaspace": lambda: make_metaspace_tokenizer().hf,
    "gpt2": gpt2,
    "qwen2": qwen2,
    "llama": llama,
    "llama with an end": lambda: llama(add_bos_token=False, add_eos_token=True),
    "word pieces": lambda: word_pieces(clean_up_tokenization_spaces=False),
    "padded": padded,
}


PLAIN = ("embedded", "letters", "metaspace", "padded")
"""Of those: what is all in tokenizer.json."""


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A cache of this file's own, where nothing is kept at first; converted models are shared."""
    embedded = open_checkpoint(None).directory
    path = tmp_path_factory.mktemp("cache")
    (path / "gguf").symlink_to(embedded.parent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOLOJAX_CACHE_DIR", str(path))
        yield path


@pytest.fixture(scope="module", params=["embedded", *KINDS])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tokenizer of a directory as it is read the second time, and transformers' own."""
    from transformers import AutoTokenizer

    if request.param == "embedded":
        directory = open_checkpoint(None).directory
    else:
        directory = tmp_path_factory.mktemp("tokenizer")
        KINDS[request.param]().save_pretrained(directory)
    first, second = load_tokenizer(directory), load_tokenizer(directory)
    assert type(first) is (LazyTokenizer if request.param in PLAIN else Tokenizer)
    assert type(second) is LazyTokenizer
    return second, AutoTokenizer.from_pretrained(directory)


def check_text(ours: Tokenizer, theirs: Any, text: str) -> None:
    for add in (True, False):
        ids = ours.encode(text, add_special_tokens=add)
        assert ids == theirs.encode(text, add_special_tokens=add)
        check_ids(ours, theirs, ids)


def check_ids(ours: Tokenizer, theirs: Any, ids: list[int]) -> None:
    for skip in (True, False):
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(
            ids, skip_special_tokens=skip
        )


@pytest.mark.parametrize("text", TEXTS)
def test_texts(pair: Any, text: str) -> None:
    ours, theirs = pair
    check_text(ours, theirs, text)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_text_and_any_ids(pair: Any, data: st.DataObject) -> None:
    ours, theirs = pair
    check_text(ours, theirs, data.draw(st.text()))
    ids = st.integers(0, ours.num_tokens - 1)
    check_ids(ours, theirs, data.draw(st.lists(ids, max_size=20)))


def test_what_is_known_of_the_vocabulary(pair: Any) -> None:
    ours, theirs = pair
    whole = Tokenizer(theirs)
    assert ours.num_tokens == whole.num_tokens
    assert ours.special_ids == whole.special_ids
    assert ours.byte_values == whole.byte_values
    for id_ in range(min(ours.num_tokens, 400)):
        assert ours.token_text(id_) == whole.token_text(id_)


@pytest.mark.parametrize("make", [codegen, lambda: word_pieces(clean_up_tokenization_spaces=True)])
def test_a_class_that_does_more_than_its_backend_stays_with_transformers(
    make: Callable[[], Any], tmp_path: Path
) -> None:
    make().save_pretrained(tmp_path)
    assert type(load_tokenizer(tmp_path)) is Tokenizer
    assert type(load_tokenizer(tmp_path)) is Tokenizer


def test_what_is_kept_is_of_the_files_as_they_are(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    llama().save_pretrained(tmp_path)
    load_tokenizer(tmp_path)
    before = load_tokenizer(tmp_path).encode("the<new>")
    path = tmp_path / "tokenizer_config.json"
    changes = {"extra_special_tokens": ["<new>"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    changed, again = load_tokenizer(tmp_path), load_tokenizer(tmp_path)
    assert type(changed) is Tokenizer
    assert type(again) is LazyTokenizer
    theirs = AutoTokenizer.from_pretrained(tmp_path).encode("the<new>")
    assert before != theirs == changed.encode("the<new>") == again.encode("the<new>")


@pytest.mark.parametrize(
    "changes",
    [
        {"bos_token": "a"},
        {"eos_token": "<new>"},
        {"extra_special_tokens": ["b"]},
        {"add_eos_token": True},
        {"split_special_tokens": True},
        {"tokenizer_class": "GPT2Tokenizer"},
    ],
)
def test_a_config_that_changes_a_plain_tokenizer_is_obeyed(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    from transformers import AutoTokenizer

    make_letters_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for _ in range(2):
        ours = load_tokenizer(tmp_path)
        assert ours.special_ids == Tokenizer(theirs).special_ids
        check_text(ours, theirs, "<s>ab <new> c</s>")


def test_transformers_tokenizer_counts_once_somebody_has_it(tmp_path: Path) -> None:
    make_letters_tokenizer().save_pretrained(tmp_path)
    load_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("abc") == [68, 69, 70]
    tokenizer.hf.add_tokens(["abc"])
    assert tokenizer.encode("abc") == [98]
    assert tokenizer.decode([98]) == "abc"


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama().save_pretrained(tmp_path)
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("FOLOJAX_CACHE_DIR", str(file / "below"))
    for _ in range(2):
        tokenizer = load_tokenizer(tmp_path)
        assert type(tokenizer) is Tokenizer
        assert tokenizer.decode(tokenizer.encode("the", add_special_tokens=False)) == "the"


_FIRST_TOKEN = """
import sys
from folojax import LLM
llm = LLM(sys.argv[1], max_model_len=64, max_num_seqs=2, max_num_batched_tokens=64, num_pages=8)
(out,) = llm.generate("The sea is", use_tqdm=False)
assert out.outputs[0].token_ids
llm.chat([{"role": "user", "content": "Hi"}], use_tqdm=False)
print(sorted({"torch", "transformers", "optax", "gguf"} & set(sys.modules)))
llm.get_tokenizer()
assert "transformers" in sys.modules
"""


def test_a_start_and_a_chat_need_no_transformers(text_directory: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _FIRST_TOKEN, str(text_directory)],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )
    assert done.stdout == "[]\n"
