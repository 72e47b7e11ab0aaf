"""How text is cut before merging, by llama.cpp's names for it."""

from tokenizers import Regex, normalizers
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split

# Source: tokenizer.json of meta-llama/Meta-Llama-3-8B, Qwen/Qwen2-7B and Qwen3.5, mistralai's
# Tekken, MiniMaxAI/MiniMax-M2 and ByteDance-Seed/Seed-Coder-8B, which differ in how many digits and
# which letters stay together, and in what may follow signs.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _SPACES
_SPLIT = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|DIGITS" + _REST.replace("/", "")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+END|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*END|DIGITS"
    + _REST
)
_BY_CASE = _CASED.replace("END", f"{_CONTRACTIONS}?").replace("DIGITS", r"\p{N}{1,3}")
_MARKED = _SPLIT.replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(
    r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]"
)
# Source: tokenization_kimi.py of moonshotai/Kimi-K2-Instruct. No word has Chinese characters.
_KIMI = r"\p{Han}+|" + _BY_CASE.replace(r"\p{M}]", r"\p{M}&&[^\p{Han}]]").replace("/]", "]")

# Source: tokenizer.json of deepseek-ai's DeepSeek-V3 and of V2 and Coder, whose patterns apply one
# after the other, each to what those before it have left.
_KANA_AND_HAN = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    _KANA_AND_HAN,
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*" + _SPACES,
)
_HAN_AND_HANGUL = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
# The cased letters of its list: those of some scripts and of mathematics are not in it.
_OTHER_CASED = (
    "\u0560-\u0588\u10c7\u10cd\u10d0-\u10ff\u1c80-\u1c88\u2d00-\u2d2d\ua790-\ua7fa\uab30-\uab68"
    "\U00010570-\U000105bc\U00016e40-\U0001df1e"
)
_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?(?:(?![{_OTHER_CASED}])[\p{{Lu}}\p{{Ll}}\p{{Lt}}])+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    _HAN_AND_HANGUL,
    r"\p{N}",
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN_AND_HANGUL, r"\p{N}")

_LLAMA3 = ("llama-bpe", "llama3", "llama-v3", "lfm2", "falcon-h1", "falcon3")
"""Names of Llama 3's way to cut text and to take a word that is a token whole."""

_TEKKEN = ("tekken", "pixtral")
"""Of Mistral's, which does so too."""

_QWEN2 = ("qwen2", "deepseek-r1-qwen")

_SPLITS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (*_LLAMA3, "smaug-bpe", "glm4", "chatglm-bpe", "dbrx"),
        (_SPLIT.replace("DIGITS", r"\p{N}{1,3}"),),
    ),
    **dict.fromkeys((*_QWEN2, "hunyuan"), (_SPLIT.replace("DIGITS", r"\p{N}"),)),
    "qwen35": (_MARKED.replace("DIGITS", r"\p{N}"),),
    "seed-coder": (
        _SPLIT.replace("DIGITS", r"\p{N}").replace(r"[^\s\p{L}\p{N}]+[\r\n]*", r"[^\s\p{L}\p{N}]+"),
    ),
    **dict.fromkeys(_TEKKEN, (_CASED.replace("END", "").replace("DIGITS", r"\p{N}"),)),
    **dict.fromkeys(("minimax-m2", "gpt-4o", "llama4"), (_BY_CASE,)),
    "tiny_aya": (r"\d{1,3}(?=(?:\d{3})*\b)", _BY_CASE),
    "kimi-k2": (_KIMI,),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm"), _DEEPSEEK_V3),
    "deepseek-llm": _DEEPSEEK_LLM,
    "deepseek-coder": _DEEPSEEK_CODER,
}
_DIGITS_APART = ("smollm", "refact", "starcoder", "command-r")
"""Names of GPT-2's way with every digit for itself."""

_PLAIN = ("gpt-2", "olmo", "exaone4")
"""Names of GPT-2's own."""


def takes_words_whole(pre: str | None) -> bool:
    """Whether a word that is a token is one, whatever the merges say."""
    return pre in (*_LLAMA3, *_TEKKEN)


def begins_with_bos(pre: str | None) -> bool:
    """Whether texts begin with the token for that where a file does not say, as in llama.cpp."""
    return pre in (*_LLAMA3, *_TEKKEN)


def normalizer(pre: str | None) -> normalizers.Normalizer | None:
    """What is done to text before it is cut."""
    composes = (*_QWEN2, "qwen35", "command-r", "tiny_aya", "olmo")
    return normalizers.NFC() if pre in composes else None


def pre_tokenizer(pre: str | None) -> PreTokenizer:
    """Cuts text, and makes letters of its bytes.

    Raises:
        ValueError: nobody knows how.
    """
    if pre in _DIGITS_APART:
        return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    if pre in _PLAIN:
        return ByteLevel(add_prefix_space=False)
    if pre in _SPLITS:
        splits = [Split(Regex(pattern), behavior="isolated") for pattern in _SPLITS[pre]]
        return Sequence([*splits, ByteLevel(add_prefix_space=False, use_regex=False)])
    known = ", ".join(map(repr, (*_DIGITS_APART, *_PLAIN, *_SPLITS)))
    raise ValueError(
        f"GGUF pre-tokenizer {pre!r} is not supported; supported: {known}. Use the model's "
        "safetensors version"
    )
