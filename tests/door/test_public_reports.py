"""What users of other engines have reported, replayed: by engine and number of the report.

Further ones are where their subject is tested: text that goes on from a prompt in
`test_prompt_end`, cuts between prompt and continuation in `test_continuations`, numbers, half
surrogates and lines of jobs in `test_user_input`, parts of messages in `test_chat_content`, ends of
texts in `test_goes_on`, checkpoints in `test_contradictions`, padding rows in `test_padding_rows`,
equals at the end of the nucleus in `test_draws`.
"""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from folojax import LLM, SamplingParams
from folojax.engine.build import default_sampling_params
from folojax.models.files.checkpoint import Checkpoint, open_checkpoint
from folojax.models.files.gguf_config import hf_config
from folojax.models.files.gguf_families import GGUF_FAMILIES
from folojax.models.files.hf_config import config_from_hf
from folojax.text.tokenizer import Tokenizer
from tests.gguf_writer import letters_metadata
from tests.letters import EOS, decode, encode, make_letters_tokenizer
from tests.models.test_config import LLAMA
from tests.text.test_chat_messages import PRINTING, TRIMMING, WALKING
from tests.text.test_prompt_end import read
from tests.tokenizer_kinds import DUMMY_PREFIX, KINDS, make_tokenizer

GREEDY = SamplingParams(temperature=0, max_tokens=6)


@pytest.mark.parametrize("end", ["OK!", "OK! ", "OK!\n", "OK!\t\n ", " OK!", "OK"])
@pytest.mark.parametrize("template", [PRINTING, TRIMMING, WALKING])
def test_a_final_message_may_end_in_spaces(end: str, template: str) -> None:
    """As in vllm 9547, transformers 34214, 34253 and 35433: "substring not found"."""
    tokenizer = Tokenizer(make_letters_tokenizer())
    messages = [{"role": "user", "content": "a joke"}, {"role": "assistant", "content": end}]
    options: Any = {"continue_final_message": True, "add_generation_prompt": False}
    text = tokenizer.render_chat(messages, template, **options)
    wanted = end.strip() if template is TRIMMING else end
    assert text.rstrip() == f"<user>a joke<assistant>{wanted}".rstrip()
    if template is not TRIMMING:
        assert text == f"<user>a joke<assistant>{wanted}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["a    b", "a \n b", "one  two   three", " ", "  a"])
def test_runs_of_spaces_come_out_as_they_are(kind: str, text: str) -> None:
    """As in lmdeploy 581 and 992, tokenizers 1141: empty tokens between words."""
    tokenizer = make_tokenizer(kind)
    prompt = tokenizer.encode("The sea")
    output = tokenizer.encode_inside(text)
    wanted = tokenizer.decode([*prompt, *output])[len(tokenizer.decode(prompt)) :]
    assert read(tokenizer, prompt, output) == wanted
    if not kind.startswith("word"):
        assert wanted == text


def test_a_piece_inside_a_word_keeps_its_marks_only_where_nothing_precedes_it() -> None:
    """As in FastBertTokenizer 102."""
    tokenizer = make_tokenizer("word-piece")
    vocabulary = tokenizer.hf.get_vocab()
    piece = next(id_ for token, id_ in vocabulary.items() if token.startswith("##"))
    text = tokenizer.hf.convert_ids_to_tokens(piece)
    assert read(tokenizer, [], [piece]) == text
    assert read(tokenizer, tokenizer.encode("sea"), [piece]) == text.removeprefix("##")
    assert tokenizer.token_text(piece) == text.removeprefix("##")


@pytest.mark.parametrize("kind", [*DUMMY_PREFIX, "bpe-no-prefix", "unigram-no-prefix"])
def test_special_tokens_in_a_text_take_no_space_with_them(kind: str) -> None:
    """As in transformers 31513, llama.cpp 8584 and 24008."""
    tokenizer = make_tokenizer(kind)
    token_ids = tokenizer.encode("<s>hello</s> sea<s>is", add_special_tokens=False)
    for border in range(len(token_ids)):
        for is_skipping in (True, False):
            prompt, output = token_ids[:border], token_ids[border:]
            before = tokenizer.decode(prompt, skip_special_tokens=is_skipping) if prompt else ""
            whole = tokenizer.decode(token_ids, skip_special_tokens=is_skipping)
            assert before + read(tokenizer, prompt, output, is_skipping=is_skipping) == whole


def test_a_banned_word_never_leads_out_of_the_allowed_tokens(letters_llm: LLM) -> None:
    """As in vllm 57986: where a ban leaves none of the allowed tokens, nothing else is sampled."""
    a, b = encode("ab")
    for words in (["aa"], ["aa", "ab"], ["aaa", "bb"]):
        for allowed in ([a], [a, b]):
            params = dataclasses.replace(GREEDY, allowed_token_ids=allowed, bad_words=words)
            (output,) = letters_llm.generate("x", params, use_tqdm=False)
            one = output.outputs[0]
            assert set(one.token_ids) <= set(allowed)
            assert all(word not in one.text for word in words)
            assert one.finish_reason in ("length", "error")
            if one.finish_reason == "error":
                assert len(one.token_ids) < 6


def test_a_stop_string_and_an_end_token_in_one_step(tiny_model: tuple) -> None:
    """As in vllm 23938: of what several tokens bring at once, the first end counts."""
    llm = LLM(
        tiny_model,
        make_letters_tokenizer(),
        max_decode_steps=6,
        max_model_len=64,
        num_pages=16,
        page_size=16,
        max_num_seqs=2,
    )
    (free,) = llm.generate("The sea", dataclasses.replace(GREEDY, ignore_eos=True), use_tqdm=False)
    ids = free.outputs[0].token_ids
    new = [i for i in range(1, 5) if ids[i] not in ids[:i] and ids[i] >= 3]
    assert len(new) > 1
    for place, end in itertools.product(new, new):
        stop = decode([ids[place]])
        params = dataclasses.replace(GREEDY, stop=[stop], stop_token_ids=[ids[end]])
        (output,) = llm.generate("The sea", params, use_tqdm=False)
        one = output.outputs[0]
        first = min(place, end)
        assert len(one.token_ids) == first + 1
        assert one.text == decode(ids[:first])
        assert one.finish_reason == "stop"
        assert one.stop_reason == (ids[end] if end <= place else stop)


def test_a_model_with_more_rows_than_its_tokenizer_has_tokens(letters_llm: LLM) -> None:
    """As in vllm 340: an id that the tokenizer does not know ended the batch in a decode error."""
    params = SamplingParams(temperature=50.0, n=8, seed=1, max_tokens=40, ignore_eos=True)
    (output,) = letters_llm.generate([3, 120, 127], params, use_tqdm=False)
    assert all(max(one.token_ids) < 98 for one in output.outputs)
    assert all(len(one.text) > 20 for one in output.outputs)


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({"temperature": 0.0}, {"temperature": 0.0}),
        ({"temperature": 0.7, "do_sample": False}, {"temperature": 0.0}),
        ({"temperature": 0.01, "top_p": 0.001, "top_k": 1}, None),
        ({"top_k": 0, "min_p": 0.0}, {}),
        ({"temperature": None, "top_k": None}, {}),
        (
            {"do_sample": True, "temperature": 1.0, "top_k": 64, "top_p": 0.95},
            {"top_k": 64, "top_p": 0.95},
        ),
    ],
)
def test_what_a_model_recommends_is_taken_as_it_is(
    stated: dict[str, Any], expected: dict[str, Any] | None
) -> None:
    """As in mlx-vlm 1331, vllm 12096 and 16718: a zero is a value, too."""
    config = config_from_hf(LLAMA)
    found = default_sampling_params(Checkpoint(Path("x"), config, stated, ()))
    assert found == SamplingParams(**(stated if expected is None else expected))


def test_what_a_model_cannot_recommend_is_refused_by_file() -> None:
    checkpoint = Checkpoint(Path("x"), config_from_hf(LLAMA), {"temperature": "hot"}, ())
    with pytest.raises(ValueError, match=r"generation_config\.json of the model: .*temperature"):
        default_sampling_params(checkpoint)


@pytest.mark.parametrize(
    ("control", "extra", "ends"),
    [
        ("<|eot_id|>", {}, [2, 9]),
        ("<|im_end|>", {}, [2, 9]),
        ("<end_of_turn>", {"eot": 5}, [2, 5, 9]),
        ("<|end|>", {"eom": 6, "eot": 9}, [2, 9, 6]),
        ("<|start|>", {}, 2),
    ],
)
def test_the_end_of_a_turn_is_known_in_older_files(
    control: str, extra: dict[str, int], ends: Any
) -> None:
    """As in llama.cpp 6772, 6903 and 8858, ollama 3759: a chat that runs to max_tokens."""
    metadata = {"general.architecture": "llama"} | letters_metadata(32)
    metadata |= {f"tokenizer.ggml.{name}_token_id": id_ for name, id_ in extra.items()}
    sizes = ("embedding_length", "feed_forward_length", "block_count", "context_length")
    metadata |= {f"llama.{name}": 32 for name in (*sizes, "attention.head_count")}
    metadata["llama.attention.layer_norm_rms_epsilon"] = 1e-5
    metadata["tokenizer.ggml.tokens"][9:11] = [control, "<|im_end|>"]  # the second is plain text
    metadata["tokenizer.ggml.token_type"][9] = 3
    config = hf_config(metadata, GGUF_FAMILIES["llama"], {}, names=())
    assert config["eos_token_id"] == ends


@pytest.mark.parametrize(
    ("keys", "windows"),
    [
        ({"sliding_window": 7}, ()),
        ({"sliding_window": 7, "use_sliding_window": True}, ()),
        ({"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 1}, (None, 7)),
        (
            {
                "sliding_window": 7,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            (7, None),
        ),
    ],
)
def test_windows_of_qwen_are_those_of_transformers(
    tmp_path: Path, keys: dict[str, Any], windows: tuple[Any, ...]
) -> None:
    """As in transformers 40126, vllm 39514: whether a window counts depends on four entries."""
    from transformers import AutoConfig

    stated = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"} | keys
    (tmp_path / "config.json").write_text(json.dumps(stated))
    theirs = AutoConfig.from_pretrained(tmp_path)
    wanted = [
        theirs.sliding_window if kind == "sliding_attention" else None
        for kind in theirs.layer_types
    ]
    found = config_from_hf(stated).windows
    assert found == windows
    assert list(found) == wanted or (not found and not any(wanted))


def test_a_letter_of_several_tokens_may_begin_in_the_prompt(real_llm: LLM) -> None:
    *prompt, last = real_llm.get_tokenizer().encode("Hello world 🌶")
    params = SamplingParams(temperature=0, max_tokens=1, allowed_token_ids=[last], logprobs=0)
    (output,) = real_llm.generate([prompt], params, use_tqdm=False)
    assert output.outputs[0].text == "🌶"
    *_, streamed = real_llm.stream([prompt], params)
    assert streamed.outputs[0].text == "🌶"


def test_a_score_of_a_text_is_that_of_its_tokens(real_llm: LLM) -> None:
    """As in lm-evaluation-harness 644: encoded by itself a continuation scores otherwise."""
    context, word = "The capital of France is", " Paris"
    (joint,) = real_llm.score(context, word, use_tqdm=False)
    (moved,) = real_llm.score(context + " ", "Paris", use_tqdm=False)
    assert joint.token_ids == moved.token_ids
    np.testing.assert_allclose(joint.logprobs, moved.logprobs, atol=1e-4)
    (output,) = real_llm.generate(
        context + word, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0), False
    )
    assert output.prompt_logprobs is not None
    last = output.prompt_logprobs[-1]
    assert last is not None
    np.testing.assert_allclose(joint.logprobs, [one.logprob for one in last.values()], atol=1e-4)
    assert open_checkpoint().eos_token_ids == (EOS,)
