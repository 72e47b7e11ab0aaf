"""Checkpoints that are broken or hostile; run as a program, it tries to load every one of them.

    python -m tests.malformed BASE WORK      prints {case: error} as JSON

BASE is a good model with a tokenizer. The process limits its own memory and time first, so what
loads without end, or fills the memory, ends it.
"""

from __future__ import annotations

import functools
import gc
import json
import resource
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

MEMORY_BYTES, CPU_SECONDS = 2**31, 150
MARKER = "code-was-run"

Change = Callable[[Path], Any]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def _config(**changes: Any) -> Change:
    """Changes entries of config.json; None removes them."""
    return functools.partial(_edit_json, "config.json", changes)


def _edit_json(name: str, changes: dict[str, Any], directory: Path) -> None:
    path = directory / name
    content = json.loads(path.read_text()) if path.exists() else {}
    content = {key: value for key, value in (content | changes).items() if value is not None}
    path.write_text(json.dumps(content))


def _generation(**changes: Any) -> Change:
    return functools.partial(_edit_json, "generation_config.json", changes)


def _tokenizer_config(**changes: Any) -> Change:
    return functools.partial(_edit_json, "tokenizer_config.json", changes)


def _text(name: str, content: str | bytes) -> Change:
    data = content.encode() if isinstance(content, str) else content
    return lambda directory: (directory / name).write_bytes(data)


def _bytes(change: Callable[[bytes], bytes]) -> Change:
    """Changes the weight file as bytes."""

    def apply(directory: Path) -> None:
        path = directory / WEIGHTS
        path.write_bytes(change(path.read_bytes()))

    return apply


def _header(change: Callable[[dict[str, Any]], Any]) -> Change:
    """Changes the header of the weight file, in place, and leaves the data."""

    def apply(data: bytes) -> bytes:
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
        header = change(header) or header
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + size :]

    return _bytes(apply)


def _entry(**fields: Any) -> Change:
    """Changes what the header says of one tensor."""
    return _header(lambda header: header["model.norm.weight"].update(fields))


def _tensors(**changes: Any) -> Change:
    """Replaces, adds and (None) removes tensors."""
    from safetensors.numpy import load_file, save_file

    def apply(directory: Path) -> None:
        names = {name.replace("__", "."): value for name, value in changes.items()}
        tensors = load_file(directory / WEIGHTS) | names
        kept = {name: value for name, value in tensors.items() if value is not None}
        save_file(kept, directory / WEIGHTS)

    return apply


def _shards(name: str, *, is_there: bool = True, twice: bool = False) -> Change:
    """An index that puts the weights into a file of that name."""

    def apply(directory: Path) -> None:
        from safetensors import safe_open

        with safe_open(directory / WEIGHTS, "numpy") as file:
            tensors = list(file.keys())
        weight_map = dict.fromkeys(tensors, name)
        if twice:
            shutil.copy(directory / WEIGHTS, directory / "other.safetensors")
            weight_map[tensors[0]] = "other.safetensors"
        if is_there:
            shutil.move(directory / WEIGHTS, (directory / name).resolve())
        else:
            (directory / WEIGHTS).unlink()
        (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return apply


class _Bomb:
    """Unpickled, it leaves a mark."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def _pickle(name: str, index: bool = False) -> Change:
    def apply(directory: Path) -> None:
        import pickle

        (directory / name).write_bytes(pickle.dumps(_Bomb(directory.parent / MARKER)))
        (directory / WEIGHTS).unlink()
        if index:
            text = json.dumps({"weight_map": {"model.norm.weight": name}})
            (directory / INDEX).write_text(text)

    return apply


def _code(target: str, **config: Any) -> Change:
    """Python files beside the model that would leave a mark, named in its configs."""

    def apply(directory: Path) -> None:
        code = f"import pathlib\npathlib.Path({str(directory.parent / MARKER)!r}).touch()\n"
        for name in ("modeling_evil.py", "tokenization_evil.py", "configuration_evil.py"):
            (directory / name).write_text(code + "class Evil: pass\n")
        _edit_json(target, config, directory)

    return apply


def _link(name: str) -> Change:
    def apply(directory: Path) -> None:
        outside = directory.parent / f"outside-{directory.name}"
        shutil.move(directory / name, outside)
        (directory / name).symlink_to(outside)

    return apply


def _sparse(name: str, size: int) -> Change:
    def apply(directory: Path) -> None:
        with (directory / name).open("wb") as file:
            file.truncate(size)

    return apply


def _gguf(change: Callable[[bytes], bytes]) -> Change:
    """A GGUF file in place of the directory."""

    def apply(directory: Path) -> None:
        from tests.models.test_gguf import write_tiny

        path = write_tiny(directory.with_suffix(".gguf"))
        path.write_bytes(change(path.read_bytes()))
        shutil.rmtree(directory)

    return apply


def _patch(data: bytes, start: int, new: bytes) -> bytes:
    return data[:start] + new + data[start + len(new) :]


def _offset_beyond(data: bytes) -> bytes:
    """The last tensor's offset, which is what the header ends with."""
    place = data.rindex(b"blk.0.ffn_down.weight") + len(b"blk.0.ffn_down.weight") + 4 + 16 + 4
    return _patch(data, place, struct.pack("<Q", 2**40))


def _no_tokenizer(directory: Path) -> None:
    for path in directory.glob("tokenizer*"):
        path.unlink()


_EVIL = {"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "configuration_evil.Evil"}

# What to do to a good model, and what the error must say.
CASES: dict[str, tuple[Change, str]] = {
    "weights: empty": (_text(WEIGHTS, ""), "truncated or no safetensors"),
    "weights: truncated": (_bytes(lambda data: data[:-100]), "truncated or no safetensors"),
    "weights: trailing bytes": (_bytes(lambda data: data + bytes(9)), "truncated or no safe"),
    "weights: endless header": (
        _bytes(lambda data: struct.pack("<Q", 2**62) + data[8:]),
        "truncated or no safetensors",
    ),
    "weights: header is no JSON": (_text(WEIGHTS, struct.pack("<Q", 8) + b"not json"), "truncated"),
    "weights: header is a list": (_text(WEIGHTS, struct.pack("<Q", 2) + b"[]"), "truncated"),
    "weights: overlapping": (_entry(data_offsets=[0, 256]), "truncated or no safetensors"),
    "weights: out of range": (_entry(data_offsets=[2**40, 2**40 + 256]), "truncated or no"),
    "weights: negative offset": (_entry(data_offsets=[-256, 0]), "truncated or no safetensors"),
    "weights: shape beyond its bytes": (_entry(shape=[2**40]), "truncated or no safetensors"),
    "weights: shape that overflows": (_entry(shape=[2**33, 2**33]), "truncated or no safe"),
    "weights: unknown dtype": (_entry(dtype="F31"), "truncated or no safetensors"),
    "weights: missing": (_tensors(model__norm__weight=None), r"missing: model\.norm\.weight"),
    "weights: unexpected": (_tensors(evil=np.zeros(3, "float32")), r"unexpected: evil \(3,\)"),
    "weights: wrong shape": (
        _tensors(model__norm__weight=np.zeros(65, "float32")),
        r"wrong shape: model\.norm\.weight is \(65,\)",
    ),
    "weights: wrong rank": (
        _tensors(model__norm__weight=np.zeros((), "float32")),
        r"wrong shape: model\.norm\.weight is \(\)",
    ),
    "weights: integers": (_tensors(model__norm__weight=np.zeros(64, "int8")), "wrong dtype"),
    "weights: none": (lambda directory: (directory / WEIGHTS).unlink(), "has neither"),
    "weights: pickle": (_pickle("pytorch_model.bin"), "pickled weights can run code"),
    "weights: pickle in the index": (_pickle("model.pt", index=True), "pickled weights can run"),
    "weights: a link that leaves": (_link(WEIGHTS), "leaves the directory"),
    "index: leaves by dots": (_shards("../x.safetensors"), "only files inside the directory"),
    "index: absolute": (_shards("/tmp/x.safetensors", is_there=False), "only files inside"),
    "index: absent file": (_shards("x.safetensors", is_there=False), "names absent files"),
    "index: a tensor twice": (_shards("x.safetensors", twice=True), "is in .* and in"),
    "index: no JSON": (
        lambda directory: (_shards("x.safetensors")(directory), _text(INDEX, "{")(directory)),
        "not valid JSON",
    ),
    "index: no map": (
        lambda directory: (_shards("x.safetensors")(directory), _text(INDEX, "{}")(directory)),
        "no weight_map",
    ),
    "config: none": (lambda directory: (directory / "config.json").unlink(), r"no config\.json"),
    "config: no JSON": (_text("config.json", "{'a': 1}"), "not valid JSON"),
    "config: not UTF-8": (_text("config.json", b"\xff\xfe{}"), "not valid JSON"),
    "config: a list": (_text("config.json", "[]"), "holds a list"),
    "config: nested without end": (_text("config.json", '{"a":' * 10**5), "not valid JSON"),
    "config: digits without end": (_text("config.json", f'{{"a": {"9" * 10**5}}}'), "not valid"),
    "config: a gigabyte": (_sparse("config.json", 2**30), "is larger than"),
    "config: a link that leaves": (_link("config.json"), "leaves the directory"),
    "config: no sizes": (_config(hidden_size=None), "lacks hidden_size"),
    "config: a billion layers": (_config(num_hidden_layers=10**9), "num_layers is 1000000000"),
    "config: a huge vocabulary": (_config(vocab_size=10**15), "vocab_size is 1000000000000000"),
    "config: another vocabulary": (_config(vocab_size=200), r"wrong shape: .*embed_tokens"),
    "config: another width": (_config(intermediate_size=97), "wrong shape: .*gate_proj"),
    "config: no heads": (_config(num_attention_heads=0), "num_attention_heads is 0"),
    "config: words for numbers": (_config(hidden_size="64"), "hidden_size is '64'"),
    "config: NaN": (_config(rms_norm_eps=float("nan")), "rms_norm_eps is nan"),
    "config: rope of words": (
        _config(rope_parameters={"rope_type": "linear", "factor": "x", "rope_theta": 1.0}),
        "factor is 'x'",
    ),
    "config: quantised": (_config(quantization_config={"quant_method": "gptq"}), "gptq"),
    "config: end outside": (_generation(eos_token_id=10**6), "eos_token_id .* ids from 0 to 127"),
    "config: its own code": (
        _code("config.json", architectures=["EvilForCausalLM"], auto_map=_EVIL),
        "EvilForCausalLM.* is not supported",
    ),
    "config: no architecture": (_config(architectures=None), "architectures None"),
    "generation: no JSON": (_text("generation_config.json", "{"), "not valid JSON"),
    "generation: no end": (_generation(eos_token_id="</s>"), "not token ids"),
    "generation: temperature": (_generation(temperature=-3.0), "temperature is -3"),
    "tokenizer: no JSON": (_text("tokenizer.json", "{"), "no tokenizer could be loaded"),
    "tokenizer: another JSON": (_text("tokenizer.json", '{"a": 1}'), "no tokenizer could be"),
    "tokenizer: none": (_no_tokenizer, "chat needs a tokenizer: pass tokenizer="),
    "tokenizer: its own code": (
        _code(
            "tokenizer_config.json",
            tokenizer_class="EvilTokenizer",
            auto_map={"AutoTokenizer": [None, "tokenization_evil.Evil"]},
        ),
        "no tokenizer could be loaded",
    ),
    "template: attributes": (
        _text("chat_template.jinja", "{{ ''.__class__.__mro__[1].__subclasses__() }}"),
        "the chat template failed",
    ),
    "template: a long loop": (
        _text("chat_template.jinja", "{% for i in range(10**10) %}{{ i }}{% endfor %}"),
        "the chat template failed",
    ),
    "template: syntax": (_text("chat_template.jinja", "{% for %}"), "the chat template failed"),
    "gguf: empty": (_gguf(lambda data: b""), "truncated or no GGUF"),
    "gguf: truncated": (_gguf(lambda data: data[:-64]), "truncated or no GGUF"),
    "gguf: another magic": (_gguf(lambda data: b"GGML" + data[4:]), "truncated or no GGUF"),
    "gguf: endless tensors": (
        _gguf(lambda data: _patch(data, 8, struct.pack("<Q", 2**60))),
        "truncated or no GGUF",
    ),
    "gguf: endless metadata": (
        _gguf(lambda data: _patch(data, 16, struct.pack("<Q", 2**60))),
        "truncated or no GGUF",
    ),
    "gguf: a tensor outside": (_gguf(_offset_beyond), "truncated or no GGUF"),
}


def _try(path: Path) -> str:
    """Loads a model, and renders its chat template if it gets so far; returns the error."""
    from folojax import LLM

    try:
        llm = LLM(path, max_num_seqs=2, max_model_len=64, page_size=16, num_pages=8)
        llm.render_chat([{"role": "user", "content": "Hi"}])
    except (ValueError, FileNotFoundError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def main(base: Path, work: Path) -> None:
    """Tries all cases within the limits."""
    import folojax  # what it takes itself is not counted
    from folojax.engine.engine import Engine

    del folojax
    shutil.copytree(base, work / "good")
    errors = {"good": _try(work / "good")}
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    for number, (case, (change, _)) in enumerate(CASES.items()):
        directory = work / f"case-{number}"
        shutil.copytree(base, directory)
        change(directory)
        path = directory if directory.exists() else directory.with_suffix(".gguf")
        errors[case] = _try(path)
    gc.collect()
    engines = sum(isinstance(thing, Engine) for thing in gc.get_objects())
    print(json.dumps({"errors": errors, "engines": engines}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
