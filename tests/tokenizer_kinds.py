"""Small real tokenizers of every kind that language models have, trained on the spot."""

import functools
import json
import random
from collections.abc import Callable
from typing import Any

from tokenizers import (
    AddedToken,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from folojax.text.tokenizer import Tokenizer

SPECIAL = ("<unk>", "<s>", "</s>")
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
SPACE = "\u2581"

CORPUS = [
    "The sea is blue and the sky is high; Paris is the capital of France, isn't it?",
    "def f(x):\n    if x > 0:\n        return x ** 2\n    return -x\n\n\nprint(f(3), f(4))",
    'for (int i = 0; i < n; ++i) {\n\t\tsum += a[i] * b["key"];\n\t}',
    "Hello world, hello there. We don't say so , do we ? They've gone ! I'm here .",
    "中文字符 и ещё один текст, naïve café, über, señor",
    "one two three four five six seven eight nine ten  eleven   twelve    thirteen",
]


def sentencepiece_bpe(has_prefix: bool) -> Tokenizer:
    """As Llama 2, Mistral and Phi-3 have it, or, without the prefix, as Gemma has."""
    trained = Backend(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Replace(" ", SPACE)
    trained.pre_tokenizer = pre_tokenizers.Split(SPACE, "merged_with_next")
    options: dict[str, Any] = {"vocab_size": 220, "show_progress": False}
    trained.train_from_iterator([" " + line for line in CORPUS], trainers.BpeTrainer(**options))
    model = json.loads(trained.to_str())["model"]
    pieces = [token for token in model["vocab"] if ord(max(token)) < 0x2590]  # the rest is bytes
    merges = [tuple(merge) for merge in model["merges"] if "".join(merge) in pieces]
    runs = [SPACE * count for count in (2, 4, 8)]
    tokens = list(dict.fromkeys([*SPECIAL, *BYTES, SPACE, *pieces, *runs]))
    backend = Backend(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=[(run[: len(run) // 2], run[: len(run) // 2]) for run in runs] + merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    return _sentencepiece(backend, has_prefix)


def sentencepiece_unigram(has_prefix: bool) -> Tokenizer:
    """As T5 and XGLM have it, falling back to bytes."""
    trained = Backend(models.Unigram())
    trained.normalizer = normalizers.Replace(" ", SPACE)
    trained.pre_tokenizer = pre_tokenizers.Split(SPACE, "merged_with_next")
    trainer = trainers.UnigramTrainer(vocab_size=200, show_progress=False, unk_token="<unk>")
    trained.train_from_iterator([" " + line for line in CORPUS], trainer)
    pieces = json.loads(trained.to_str())["model"]["vocab"]
    known = {piece: score for piece, score in pieces if ord(max(piece)) < 0x2590}
    known |= {SPACE: -4.0, SPACE * 2: -5.0, SPACE * 4: -6.0}
    vocab = [(token, 0.0) for token in SPECIAL] + [(byte, -99.0) for byte in BYTES]
    vocab += [(piece, score) for piece, score in known.items() if piece not in SPECIAL]
    backend = Backend(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    return _sentencepiece(backend, has_prefix)


def _sentencepiece(backend: Backend, has_prefix: bool) -> Tokenizer:
    spaces = normalizers.Replace(" ", SPACE)
    parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if has_prefix:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces])
        parts.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = spaces
    backend.decoder = decoders.Sequence(parts)
    return _wrap(backend)


def metaspace(has_prefix: bool) -> Tokenizer:
    """The same with the library's own decoder for it, as newer conversions have."""
    backend = Backend.from_str(sentencepiece_bpe(has_prefix).hf.backend_tokenizer.to_str())
    scheme = "first" if has_prefix else "never"
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme)]
    )
    return _wrap(backend)


def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen have it."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator([*CORPUS, "🌶🌶 中中"], trainer)
    return _wrap(backend)


def word_piece(is_cleaning_up: bool) -> Tokenizer:
    """As BERT has it: pieces inside a word begin with ##."""
    backend = Backend(models.WordPiece(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(
        vocab_size=250, show_progress=False, special_tokens=list(SPECIAL)
    )
    backend.train_from_iterator(CORPUS, trainer)
    return _wrap(backend, is_cleaning_up)


def word_ends() -> Tokenizer:
    """As the first GPT has it: a word's last piece ends in </w>, and is followed by a space."""
    backend = Backend(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=250,
        show_progress=False,
        special_tokens=list(SPECIAL),
        end_of_word_suffix="</w>",
    )
    backend.train_from_iterator(CORPUS, trainer)
    return _wrap(backend)


def _wrap(backend: Backend, is_cleaning_up: bool = False) -> Tokenizer:
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return Tokenizer(
        PreTrainedTokenizerFast(
            tokenizer_object=backend,
            bos_token="<s>",
            eos_token="</s>",
            unk_token="<unk>",
            clean_up_tokenization_spaces=is_cleaning_up,
        )
    )


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "bpe": functools.partial(sentencepiece_bpe, True),
    "bpe-no-prefix": functools.partial(sentencepiece_bpe, False),
    "unigram": functools.partial(sentencepiece_unigram, True),
    "unigram-no-prefix": functools.partial(sentencepiece_unigram, False),
    "metaspace": functools.partial(metaspace, True),
    "metaspace-no-prefix": functools.partial(metaspace, False),
    "byte-level": byte_level,
    "word-piece": functools.partial(word_piece, False),
    "word-piece-cleaned": functools.partial(word_piece, True),
    "word-ends": word_ends,
}

DUMMY_PREFIX = ("bpe", "unigram", "metaspace")
"""Those that begin every text with a space that is not there."""


@functools.cache
def make_tokenizer(kind: str) -> Tokenizer:
    """One of each kind, for all tests."""
    return KINDS[kind]()


_PARTS = (
    *"abcdefgh .,;:!?'\"()[]{}<>=+-*/\\_#@",
    *("  ", "    ", "        ", "\n", "\n\n", "\t", " \n ", "\r\n"),
    *("The", " sea", "hello", " world", " is", "def f(x):\n    return x", "isn't", " , do we ?"),
    *("é", "e\u0301", "ü", "n\u0303", "o\u0302\u0323", "ﬁ"),
    *("中文", "字", "日本", "한국", "и ещё", "שלום", "مرحبا"),
    *("😀", "🌶", "👩‍👩‍👧", "🇫🇷", "👍🏽", "\ufffd", "\u2581", "\u00a0", "\u200b"),
)


def random_text(random_: random.Random) -> str:
    """Code, emoji, Chinese, combining marks, spaces, and all of it mixed."""
    return "".join(random_.choices(_PARTS, k=random_.randint(1, 25)))
