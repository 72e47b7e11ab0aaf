"""Laws of JSON Lines jobs: every line exactly once, whatever ends the process and however often."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from folojax import RequestOutput, SamplingParams
from folojax.jsonl import dump, line_seed
from folojax.jsonl_job import JsonlJob, Summary
from folojax.jsonl_output import open_output
from tests.stub_llm import FAILING_PROMPT, MAX_NUM_SEQS, StubLLM

STUB = Path(__file__).parent / "stub_llm.py"
NUM_LINES = 10_000


def line(line_id: Any = None, prompt: Any = "Hello", **sampling: Any) -> bytes:
    fields = {"prompt": prompt, "sampling": {"max_tokens": 2} | sampling}
    return json.dumps(fields | ({} if line_id is None else {"id": line_id})).encode() + b"\n"


def run(
    lines: Iterable[bytes | None],
    target: Path,
    *,
    resume: bool = True,
    llm: Any = None,
    **options: Any,
) -> Summary:
    defaults = options.pop("defaults", SamplingParams(max_tokens=4))
    with open_output(target, resume=resume) as output:
        return JsonlJob(llm or StubLLM(), output, defaults, **options).run(lines)


def entries(target: Path) -> list[dict[str, Any]]:
    """What is in an output file, in the order of the input."""
    found = [json.loads(raw) for raw in target.read_bytes().splitlines()]
    return sorted(found, key=lambda entry: entry["line"])


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def test_ten_thousand_lines_survive_three_kills(tmp_path: Path) -> None:
    """SIGKILL from outside, at sizes of the output that fall anywhere in a line."""
    source, target, whole = (tmp_path / name for name in ("in", "out", "whole"))
    draw = random.Random(5)
    lines = [
        line(f"q{i}", f"prompt {i % 50}", max_tokens=draw.randint(1, 4)) for i in range(NUM_LINES)
    ]
    source.write_bytes(b"".join(lines))
    assert run(lines, whole).num_done == NUM_LINES
    sizes = sorted(draw.randint(1, int(0.9 * whole.stat().st_size)) for _ in range(3))
    command = [sys.executable, str(STUB), str(source), str(target)]
    for size in sizes:
        with subprocess.Popen([*command, "0.0005"]) as process:
            while process.poll() is None and (not target.exists() or target.stat().st_size < size):
                time.sleep(0.0005)
            process.kill()
            assert process.wait() == -signal.SIGKILL
        assert size <= target.stat().st_size < whole.stat().st_size
    subprocess.run([*command, "0"], check=True)
    found = entries(target)
    assert [entry["id"] for entry in found] == [f"q{i}" for i in range(NUM_LINES)]
    assert found == entries(whole)


def test_a_line_torn_at_any_byte_is_done_again(target: Path, tmp_path: Path) -> None:
    lines = [line("a"), line("b", FAILING_PROMPT), b"not JSON\n", line("d")]
    whole = tmp_path / "whole"
    run(lines, whole)
    content = whole.read_bytes()
    for size in range(len(content) + 1):
        target.write_bytes(content[:size])
        with open_output(target, resume=True) as output:
            kept = content[:size].rfind(b"\n") + 1
            assert output.num_dropped_bytes == size - kept
            assert target.read_bytes() == content[:kept]
            JsonlJob(StubLLM(), output, SamplingParams(max_tokens=4)).run(lines)
        assert entries(target) == entries(whole)


def test_resuming_what_is_finished_changes_nothing(target: Path) -> None:
    lines = [line("a"), line("a"), line(), b"[]\n", line("long", "x" * 101), b"\n", line(7)]
    first = run(lines, target)
    assert (first.num_done, first.num_skipped, first.num_bad) == (3, 0, 3)
    content = target.read_bytes()
    for _ in range(2):
        llm = StubLLM()
        again = run(lines, target, llm=llm)
        assert (again.num_done, again.num_skipped, again.num_bad) == (0, 6, 0)
        assert again.num_bad_before == 3
        assert llm.most_queued == 0
        assert target.read_bytes() == content


def test_a_lines_tokens_are_its_own(target: Path, tmp_path: Path) -> None:
    """Neither order nor neighbours nor the engine's room decide a seed."""
    lines = [line(i, "the same") for i in range(20)]
    run(lines, target)
    other = tmp_path / "other"
    run([*lines[::-1], line("more")], other, max_queued=1)
    by_id = {entry["id"]: entry["outputs"] for entry in entries(other)}
    assert all(entry["outputs"] == by_id[entry["id"]] for entry in entries(target))
    assert len({entry["outputs"][0]["seed"] for entry in entries(target)}) == 20
    other.unlink()
    run(lines, other, seed=1)
    assert entries(other) != entries(target)


def test_seeds_are_stable_and_exact_in_doubles() -> None:
    # Other numbers would change what a resumed job generates.
    assert [line_seed(0, "a"), line_seed(1, "a"), line_seed(0, 1)] == [
        3649112230393628,
        689793359134330,
        1631926063554650,
    ]
    assert line_seed(0, 1) == line_seed(0, "1")
    assert len({line_seed(seed, line_id) for seed in range(9) for line_id in range(99)}) == 891
    assert all(line_seed(0, i) < 2**52 for i in range(99))
    assert line_seed(0, "\ud800") >= 0


def test_a_seed_of_its_own_wins_and_greedy_has_none(target: Path) -> None:
    run([line("a", seed=5, n=2), line("b", temperature=0), line("c", seed=None)], target)
    seeds = [[sample["seed"] for sample in entry["outputs"]] for entry in entries(target)]
    assert seeds == [[5, 6], [None], [line_seed(0, "c")]]


def test_little_is_queued_and_read_at_once(target: Path) -> None:
    """Neither the input nor its requests are held in memory."""
    llm, num_read = StubLLM(), 0

    def lines() -> Iterable[bytes]:
        nonlocal num_read
        for i in range(500):
            num_read += 1
            assert num_read <= len(target.read_bytes().splitlines()) + 17
            yield line(i, n=1 + i % 2)

    summary = run(lines(), target, llm=llm, max_queued=2 * MAX_NUM_SEQS)
    assert summary.num_done == 500
    assert MAX_NUM_SEQS < llm.most_queued <= 2 * MAX_NUM_SEQS + 1
    assert llm.num_queued == 0


def test_a_line_that_is_late_holds_up_nothing(target: Path) -> None:
    def lines() -> Iterable[bytes | None]:
        yield None
        yield line("a")
        while not target.read_bytes():
            yield None
        yield b"{"
        yield None

    summary = run(lines(), target)
    assert (summary.num_done, summary.num_bad) == (1, 1)
    assert [entry["line"] for entry in entries(target)] == [1, 2]


def test_an_entry_is_written_before_the_next_step(target: Path) -> None:
    seen: list[Any] = []
    run(
        [line(i, max_tokens=1 + i) for i in range(3)],
        target,
        on_entry=lambda entry: seen.append((entry["id"], len(target.read_bytes().splitlines()))),
    )
    assert seen == [(0, 1), (1, 2), (2, 3)]


def test_what_interrupts_a_job_leaves_the_engine_empty(target: Path) -> None:
    llm = StubLLM()

    def interrupt(entry: object) -> None:
        raise KeyboardInterrupt

    lines = [line(i, max_tokens=1 + i) for i in range(9)]
    with pytest.raises(KeyboardInterrupt):
        run(lines, target, llm=llm, on_entry=interrupt)
    assert not llm.has_unfinished_requests()
    assert [entry["id"] for entry in entries(target)] == [0]
    assert run(lines, target, llm=llm).num_done == 8


def test_what_a_broken_step_aborts_is_taken_out_too(target: Path) -> None:
    """An LLM holds the outputs of what an interrupted step has lost until somebody steps again."""

    class Interrupted(StubLLM):
        num_held = 0

        def step(self) -> list[RequestOutput]:
            if self.num_held:
                self.num_held = 0
                return []
            self.num_held = len(self._requests)
            self.abort_request(list(self._requests))
            raise KeyboardInterrupt

        def abort_request(self, request_ids: str | Sequence[str]) -> None:
            super().abort_request([one for one in request_ids if one in self._requests])

        def has_unfinished_requests(self) -> bool:
            return bool(self.num_held) or super().has_unfinished_requests()

    llm = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        run([line("a"), line("b")], target, llm=llm)
    assert not llm.has_unfinished_requests()
    assert target.read_bytes() == b""


BAD_LINES: dict[str, tuple[bytes, str]] = {
    "not_json": (b"{", "not JSON"),
    "not_utf8": (b'{"prompt": "\xff"}', "not UTF-8"),
    "not_an_object": (b'"text"', "must be an object"),
    "nested": (b'{"prompt": ' + b"[" * 100_000, "nested"),
    "nan": (b'{"prompt": "a", "sampling": {"top_p": NaN}}', "NaN is no number"),
    "key_twice": (b'{"prompt": "a", "prompt": "b"}', "'prompt' comes twice"),
    "no_prompt": (b"{}", "one of prompt, messages, prompt_token_ids"),
    "two_prompts": (b'{"prompt": "a", "prompt_token_ids": [1]}', "'prompt', 'prompt_token_ids'"),
    "unknown_key": (b'{"prompt": "a", "max_tokens": 3}', "['max_tokens']"),
    "prompt_no_text": (b'{"prompt": 5}', "prompt is 5; it must be text"),
    "prompt_null": (b'{"prompt": null}', "prompt is None"),
    "ids_no_list": (b'{"prompt_token_ids": "1"}', "prompt_token_ids is '1'"),
    "no_messages": (b'{"messages": []}', "messages is []"),
    "message_no_object": (b'{"messages": ["Hi"]}', "messages is ['Hi']"),
    "message_no_role": (b'{"messages": [{"content": "Hi"}]}', "messages is"),
    "message_no_content": (b'{"messages": [{"role": "user", "contents": "Hi"}]}', "messages is"),
    "template_refuses": (b'{"messages": [{"role": "nobody", "content": ""}]}', "'nobody'"),
    "id_no_text": (b'{"prompt": "a", "id": [1]}', "id is [1]"),
    "id_float": (b'{"prompt": "a", "id": 1.5}', "id is 1.5"),
    "id_bool": (b'{"prompt": "a", "id": true}', "id is True"),
    "id_twice": (line("good"), "id 'good' is that of line 1"),
    "sampling_no_object": (b'{"prompt": "a", "sampling": 3}', "sampling is 3"),
    "sampling_unknown": (line("x", temprature=1), "['temprature']"),
    "sampling_value": (line("x", top_p=2), "top_p is 2"),
    "prompt_too_long": (line("x", "x" * 1000), "prompt has 1000 tokens"),
    "prompt_empty": (line("x", ""), "prompt has 0 tokens"),
    "engine_fails": (json.dumps({"prompt_token_ids": FAILING_PROMPT}).encode(), "no distribution"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_reported_and_the_job_goes_on(case: str, target: Path) -> None:
    raw, reason = BAD_LINES[case]
    bad = []
    summary = run(
        [line("good"), b"  \n", raw.rstrip() + b"\n", line("after")],
        target,
        on_entry=lambda entry: bad.append(entry) if entry["line"] == 3 else None,
    )
    assert (summary.num_done, summary.num_bad) == (2, 1)
    assert [entry["line"] for entry in entries(target)] == [1, 3, 4]
    assert reason in json.dumps(bad, ensure_ascii=False).replace("\\\\", "\\")
    assert "1 bad" in str(summary)


def test_a_line_that_was_mended_is_done(target: Path) -> None:
    """Its old entry has no id, so it does not stand for the line any more."""
    run([b"{\n", line("b")], target)
    summary = run([line("a"), line("b")], target)
    assert (summary.num_done, summary.num_skipped, summary.num_bad_before) == (1, 1, 1)


def test_entries_of_another_input_are_counted(target: Path) -> None:
    run([line("a"), line("b")], target)
    summary = run([line("c"), line("b")], target)
    assert (summary.num_done, summary.num_skipped, summary.num_foreign) == (1, 1, 1)
    assert "1 entries of the output are of no line" in str(summary)


def test_forms_of_prompts(target: Path) -> None:
    lines = [
        b'\xef\xbb\xbf{"prompt": "<user>Hi"}\r\n',
        b'{"messages": [{"role": "user", "content": "Hi"}]}\n',
        json.dumps({"prompt_token_ids": list(b"<user>Hi")}).encode(),  # the last has no end
    ]
    run(lines, target, defaults=SamplingParams(temperature=0, max_tokens=3))
    found = entries(target)
    assert [entry["id"] for entry in found] == ["line-1", "line-2", "line-3"]
    assert found[0]["outputs"] == found[1]["outputs"] == found[2]["outputs"]
    assert found[0]["usage"] == {"prompt_tokens": 8, "output_tokens": 3}


def test_an_entry_has_all_of_a_sample(target: Path) -> None:
    run([line("\u2028ü\ud800", logprobs=0, prompt_logprobs=0, n=2, seed=1)], target)
    (entry,) = entries(target)
    assert entry["id"] == "\u2028ü\ud800"
    assert len(target.read_text(encoding="ascii").splitlines()) == 1
    assert [sample["index"] for sample in entry["outputs"]] == [0, 1]
    assert entry["prompt_logprobs"] == [None]
    for sample in entry["outputs"]:
        assert sample["text"] == " ".join(map(str, sample["token_ids"]))
        assert (sample["finish_reason"], sample["stop_reason"]) == ("length", None)
        assert [list(token) for token in sample["logprobs"]] == [
            [str(token)] for token in sample["token_ids"]
        ]
        first = sample["token_ids"][0]
        wanted = {"logprob": None, "rank": 1, "decoded_token": str(first)}
        assert sample["logprobs"][0] == {str(first): wanted}


@pytest.mark.parametrize(
    "content",
    [
        b"precious\n",
        b"precious",
        b'{"id": "a"}\n',
        b'{"id": "a", "line": 1, "outputs": 5}\n',
        b'{"line": 1, "id": "a", "error": ""}\n',
        dump({"id": "a", "line": 1, "error": "x"}) + b'{"id": "b"\n',
    ],
)
def test_a_file_that_is_no_output_is_left_alone(content: bytes, target: Path) -> None:
    target.write_bytes(content)
    with pytest.raises(ValueError, match=f"{target} cannot be resumed: line "):
        run([line("a")], target)
    assert target.read_bytes() == content


def test_what_is_there_is_kept_unless_asked(target: Path) -> None:
    run([line("a")], target, resume=False)
    with pytest.raises(ValueError, match=r"exists: ask to resume it or to overwrite it"):
        run([line("b")], target, resume=False)
    with (
        pytest.raises(ValueError, match="ask for one of them"),
        open_output(target, resume=True, overwrite=True),
    ):
        pass
    with open_output(target, overwrite=True) as output:
        JsonlJob(StubLLM(), output).run([line("c")])
    assert [entry["id"] for entry in entries(target)] == ["c"]
    target.write_bytes(b"")
    run([line("d")], target, resume=False)  # nothing is lost


def test_two_jobs_cannot_write_one_file(target: Path) -> None:
    with open_output(target), pytest.raises(ValueError, match="another job"):
        run([line("a")], target)
    run([line("a")], target)


def test_a_pipe_is_written_and_never_resumed(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ValueError, match="is no file"):
        run([line("a")], pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    run([line("a")], pipe, resume=False)
    assert json.loads(os.read(reader, 10_000))["id"] == "a"
    os.close(reader)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda llm: {"defaults": SamplingParams(seed=3)}, "defaults.seed is 3"),
        (lambda llm: {"max_queued": 0}, "max_queued is 0"),
        (lambda llm: llm.add_request("x", {"prompt": "x"}, SamplingParams()) or {}, "unfinished"),
    ],
    ids=["seed", "max_queued", "busy"],
)
def test_a_job_refuses(
    change: Callable[[StubLLM], dict[str, Any]], message: str, target: Path
) -> None:
    llm = StubLLM()
    with pytest.raises(ValueError, match=message):
        run([line("a")], target, llm=llm, **change(llm))
    assert target.read_bytes() == b""


# Another value than the default for every field, as JSON spells it.
SAMPLING: dict[str, Any] = {
    "n": 3,
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 5,
    "min_p": 0.5,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "repetition_penalty": 1.5,
    "max_tokens": 5,
    "min_tokens": 1,
    "stop": ["a", "b"],
    "include_stop_str_in_output": True,
    "stop_token_ids": [5],
    "ignore_eos": True,
    "logit_bias": {"5": 1.5},
    "allowed_token_ids": [5, 6],
    "bad_words": ["c"],
    "logprobs": 1,
    "prompt_logprobs": 1,
    "seed": 2**63,
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
    "detokenize": False,
    "record": True,
    "logits_processors": ["ban"],
    "activation_edits": ["steer"],
    "activations": True,
}


def test_all_fields_are_in_the_table() -> None:
    assert set(SAMPLING) == {field.name for field in dataclasses.fields(SamplingParams)}


@pytest.mark.parametrize("name", SAMPLING)
def test_each_field_of_sampling_reaches_the_engine(name: str, target: Path) -> None:
    class Recorder(StubLLM):
        def add_request(self, *args: Any) -> None:
            seen.append(args[2])
            super().add_request(*args)

    seen: list[SamplingParams] = []
    run(
        [json.dumps({"prompt": "a", "sampling": {name: SAMPLING[name]}}).encode()],
        target,
        llm=Recorder(),
    )
    value = getattr(seen[0], name)
    if name == "logit_bias":
        assert dict(value) == {5: 1.5}
    else:
        assert value == (tuple(SAMPLING[name]) if isinstance(value, tuple) else SAMPLING[name])
    assert seen[0].max_tokens == (5 if name == "max_tokens" else 4)


def test_a_bias_of_no_token_is_refused(target: Path) -> None:
    summary = run([line("a", logit_bias={"the": 1}), line("b")], target)
    assert (summary.num_done, summary.num_bad) == (1, 1)
    assert "'the'; it must be a token id" in entries(target)[0]["error"]
