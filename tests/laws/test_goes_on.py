"""Text that goes on from a prompt, and where it ends, in an engine: every way to get at it."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from folojax import LLM, SamplingParams
from folojax.text.tokenizer_files import LazyTokenizer, load_tokenizer
from tests.conftest import check_is_empty
from tests.jsonl_runs import entries, run
from tests.letters import make_letters_tokenizer
from tests.reference import TINY_LIMITS

SPACE = "\u2581"
PIECES = ["hi", "hello", "a", "b", "x", "=", "1", "\n", "[", "]", "|", "user", "assistant"]


@pytest.fixture(scope="module")
def llama2() -> Any:
    """A transformers tokenizer as Llama 2's, with bytes for one letter, and a template."""
    special = ["<unk>", "<s>", "</s>"]
    letters = [f"<0x{byte:02X}>" for byte in "🌶".encode()]
    spaced = [SPACE + piece for piece in PIECES if piece.isalnum()]
    tokens = [*special, *letters, *PIECES, SPACE, SPACE * 4, *spaced]
    backend = Backend(
        models.BPE(
            {token: i for i, token in enumerate(tokens)},
            [(SPACE, letter) for letter in "abx"],
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=template
    )


@pytest.fixture(scope="module")
def shared_llm(tiny_model: tuple, llama2: Any) -> LLM:
    return LLM(tiny_model, llama2, **TINY_LIMITS)


@pytest.fixture
def force(shared_llm: LLM, llama2: Any) -> Any:
    """Parameters under which nothing but one token is sampled, so often."""

    def make(token: str, count: int = 1, **options: Any) -> SamplingParams:
        only = llama2.convert_tokens_to_ids(token)
        return SamplingParams(temperature=0, max_tokens=count, allowed_token_ids=[only], **options)

    yield make
    check_is_empty(shared_llm)


Force = Callable[..., SamplingParams]


@pytest.mark.parametrize(
    ("token", "text"), [("▁hi", " hi"), ("▁▁▁▁", "    "), ("hi", "hi"), ("▁", " ")]
)
def test_the_first_token_keeps_its_space(
    shared_llm: LLM, force: Force, token: str, text: str, target: Path
) -> None:
    params = force(token, logprobs=1)
    (output,) = shared_llm.generate("a", params, use_tqdm=False)
    one = output.outputs[0]
    assert one.text == text
    assert one.logprobs is not None
    assert one.logprobs[0][one.token_ids[0]].decoded_token == text
    *_, last = shared_llm.stream("a", force(token, 2))
    assert last.outputs[0].text == text * 2
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "a"}]
    (output,) = shared_llm.chat(
        messages, params, False, add_generation_prompt=False, continue_final_message=True
    )
    assert output.outputs[0].text == text
    run([b'{"prompt": "a"}\n'], target, llm=shared_llm, defaults=params)
    assert entries(target)[0]["outputs"][0]["text"] == text


def test_spaces_of_code_are_kept(shared_llm: LLM, force: Force) -> None:
    (output,) = shared_llm.generate("a=1\n", force("▁▁▁▁", 2), use_tqdm=False)
    assert output.outputs[0].text == " " * 8


def test_a_stop_string_with_a_space_is_found_in_the_first_word(
    shared_llm: LLM, force: Force
) -> None:
    (output,) = shared_llm.generate("a", force("▁hello", 3, stop=[" hello"]), use_tqdm=False)
    one = output.outputs[0]
    assert (one.text, one.stop_reason, len(one.token_ids)) == ("", " hello", 1)
    (output,) = shared_llm.generate("a", force("hello", 3, stop=[" hello"]), use_tqdm=False)
    assert (output.outputs[0].text, output.outputs[0].stop_reason) == ("hello" * 3, None)


def test_a_prompt_that_ends_inside_a_character_is_gone_on_with(
    shared_llm: LLM, force: Force, llama2: Any
) -> None:
    letters = [f"<0x{byte:02X}>" for byte in "🌶".encode()]
    prompt = llama2.convert_tokens_to_ids(["▁a", *letters[:3]])
    (output,) = shared_llm.generate(prompt, force(letters[3]), use_tqdm=False)
    assert output.outputs[0].text == "🌶"
    for stop in ([], ["🌶"]):
        *_, last = shared_llm.stream(prompt, force(letters[3], stop=stop))
        assert last.outputs[0].text == ("" if stop else "🌶")


def test_samples_and_forks_go_on_from_the_prompt(shared_llm: LLM, force: Force) -> None:
    params = dataclasses.replace(force("▁hi", 4), temperature=1.0, n=2, seed=1)
    (output,) = shared_llm.generate("a", params, use_tqdm=False)
    assert [one.text for one in output.outputs] == [" hi" * 4] * 2
    shared_llm.add_request("trunk", "a", force("▁hi", 4))
    while not any(len(one.outputs[0].token_ids) == 2 for one in shared_llm.step()):
        pass
    shared_llm.fork("trunk", "branch", force("▁hi", 4))
    texts: dict[str, str] = {}
    while shared_llm.has_unfinished_requests():
        texts |= {one.request_id: one.outputs[0].text for one in shared_llm.step()}
    assert texts == {"trunk": " hi" * 4, "branch": " hi" * 4}


def test_a_score_has_no_lone_space(shared_llm: LLM, llama2: Any) -> None:
    (score,) = shared_llm.score("a", " b", use_tqdm=False)
    assert llama2.convert_ids_to_tokens(score.prompt_token_ids) == ["▁a"]
    assert llama2.convert_ids_to_tokens(score.token_ids) == ["▁b"]
    (ids,) = shared_llm.score([score.prompt_token_ids], [score.token_ids], use_tqdm=False)
    assert ids.logprobs == score.logprobs
    with pytest.raises(ValueError, match="continuation 1: prompt and continuation have"):
        shared_llm.score("a", ["b", "b" * 130])


CHATML = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def end_llm(tiny_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., LLM]:
    """An engine of a directory that states these end tokens in these files."""

    def make(config: Any, generation: Any, tokenizer_eos: str | None) -> LLM:
        directory = tmp_path_factory.mktemp("ends") / "model"
        shutil.copytree(tiny_directory, directory)
        for name, value in (("config.json", config), ("generation_config.json", generation)):
            path = directory / name
            stated = json.loads(path.read_text()) if path.is_file() else {}
            path.write_text(json.dumps(stated | {"eos_token_id": value}))
        tokenizer = make_letters_tokenizer()
        tokenizer.eos_token = tokenizer_eos
        tokenizer.save_pretrained(directory)
        return LLM(directory, dtype="float32", **TINY_LIMITS)

    return make


def finish(llm: LLM, token: int, **options: Any) -> tuple[Any, ...]:
    params = SamplingParams(temperature=0, max_tokens=3, allowed_token_ids=[token], **options)
    one = llm.generate("ab", params, use_tqdm=False)[0].outputs[0]
    return one.finish_reason, one.stop_reason, len(one.token_ids), one.text


@pytest.mark.parametrize(
    ("config", "generation", "tokenizer_eos", "ends"),
    [
        (None, None, "</s>", (2,)),
        (1, None, "</s>", (2, 1)),  # the tokenizer alone knows the end of a turn
        (1, 0, "</s>", (2, 0, 1)),
        (1, [2, 0], "</s>", (2, 0, 1)),
        (2, [0, 1], None, (0, 1, 2)),
        ([0, 1], None, None, (0, 1)),
    ],
)
def test_a_text_ends_at_the_ends_of_all_three_files(
    end_llm: Callable[..., LLM],
    config: Any,
    generation: Any,
    tokenizer_eos: str | None,
    ends: Sequence[int],
) -> None:
    """As in vllm 4180 and 4182, mlx-vlm 309 and 2112: `stop_reason` of further ends is their id."""
    llm = end_llm(config, generation, tokenizer_eos)
    assert finish(llm, ends[0]) == ("stop", None, 1, "")
    for token in ends[1:]:
        assert finish(llm, token) == ("stop", token, 1, "")
    for token in {0, 1, 2} - set(ends):
        assert finish(llm, token)[:3] == ("length", None, 3)
    assert finish(llm, ends[-1], ignore_eos=True)[:3] == ("length", None, 3)
    assert finish(llm, ends[-1], ignore_eos=True, stop_token_ids=[ends[-1]])[:2] == (
        "stop",
        ends[-1],
    )
    with pytest.raises(ValueError, match="leave none of them"):
        finish(llm, ends[-1], min_tokens=1)
    message = [{"role": "user", "content": "x"}]
    params = SamplingParams(temperature=0, max_tokens=3, allowed_token_ids=[ends[-1]])
    assert llm.chat(message, params, use_tqdm=False)[0].outputs[0].finish_reason == "stop"


def test_the_end_token_of_a_tokenizer_is_known_without_transformers(tmp_path: Path) -> None:
    """Read as it is, from the cache, and by transformers itself."""
    plain, older = tmp_path / "plain", tmp_path / "older"
    make_letters_tokenizer().save_pretrained(plain)
    tokenizer = load_tokenizer(plain)
    assert isinstance(tokenizer, LazyTokenizer)
    assert tokenizer.eos_token_id == 2
    shutil.copytree(plain, older)
    config = json.loads((older / "tokenizer_config.json").read_text())
    (older / "tokenizer_config.json").write_text(
        json.dumps(config | {"eos_token": "<pad>", "x": 1})
    )
    kinds = [type(load_tokenizer(older)) for _ in range(2)]
    assert kinds[1] is LazyTokenizer
    assert load_tokenizer(older).eos_token_id == load_tokenizer(older).hf.eos_token_id == 0
