"""Settings and engines that all tests share."""

import gc
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Processes that share the cores, each with a thread for every core, wait for each other: torch then
# takes twice as long. To be set before it is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import jax
import pytest
from jax._src import compiler  # where JAX lets programs be compiled by XLA's options
from jaxtyping import install_import_hook

# Shapes in signatures are checked in every call, where arrays are handled. (Not at the user's door:
# there a wrong type must meet our own ValueError.)
_ARRAY_ROOMS = ("attention", "kv", "models", "sampling", "steps")
install_import_hook([f"folojax.{name}" for name in _ARRAY_ROOMS], "beartype.beartype")

# Until all tests are known, nearly all that is made stays.
gc.disable()

from folojax import LLM  # noqa: E402  (after the hook)
from folojax.backend.compilation_cache import enable_compilation_cache  # noqa: E402
from folojax.compile.programs import clear_programs  # noqa: E402
from folojax.models.files.checkpoint import build_module, load_params, open_checkpoint  # noqa: E402
from tests.letters import make_letters_tokenizer  # noqa: E402
from tests.reference import MORE_LIMITS, save_tiny  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)

# A shell's background job starts with Ctrl-C ignored, and hands that on to the commands that tests
# interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


QUICK = "xla_cpu_use_fusion_emitters=false", "xla_cpu_parallel_codegen_split_count=1"
"""Flags of XLA for a CPU with which it compiles in a third of the time, most of which goes into
making what it compiles with: for each fusion, and for each of many parts of a program."""

USUAL: dict[str, bool | int] = {
    "xla_cpu_use_fusion_emitters": True,
    "xla_cpu_parallel_codegen_split_count": 32,
}
"""Those flags as they are when nobody says anything."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the longer proofs too")
    parser.addoption(
        "--gpu-compiler",
        metavar="DIR",
        help="run what compiles for a GPU too; DIR has jax-cuda12-plugin and jax-cuda12-pjrt",
    )
    parser.addoption("--adapters", action="store_true", help="run what needs others' packages too")


def pytest_configure(config: pytest.Config) -> None:
    """Without the longer proofs, XLA optimises little, and that in the quickest way.

    Compiling is what tests spend most of their time on; this takes a sixth of it.
    """
    if not config.getoption("--slow"):
        jax.config.update("jax_disable_most_optimizations", True)
        # Of the processes that tests start.
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"
        # Of those and of this one: XLA reads it when the first device is asked for, which is below.
        given, quick = os.environ.get("XLA_FLAGS", ""), " --".join(["", *QUICK])
        if quick not in given:
            os.environ["XLA_FLAGS"] = given + quick
    enable_compilation_cache()


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """What lives as long as the tests is not looked through for garbage again and again."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    gc.enable()


@pytest.fixture(scope="module")
def optimised(pytestconfig: pytest.Config) -> Iterator[None]:
    """The programs of a module's tests are those that users run."""
    if pytestconfig.getoption("--slow"):
        yield
        return

    def options(*args: Any, **kwargs: Any) -> Any:
        found = of_few(*args, **kwargs)
        found.env_option_overrides = [*found.env_option_overrides, *USUAL.items()]
        return found

    clear_programs()
    of_few = compiler.get_compile_options
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "get_compile_options", options)
        jax.config.update("jax_disable_most_optimizations", False)
        yield
        jax.config.update("jax_disable_most_optimizations", True)
    clear_programs()  # programs of both kinds have different bits, and no engine is to have both


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    options = {"--slow": "slow", "--gpu-compiler": "gpu_compiler", "--adapters": "adapters"}
    for option, marker in options.items():
        if not config.getoption(option):
            left_out = [item for item in items if item.get_closest_marker(marker)]
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if not item.get_closest_marker(marker)]


@pytest.fixture(autouse=True, scope="module")
def room_for_programs() -> Iterator[None]:
    """Forgets compiled programs before they are too many for one process.

    Each is some ten mapped areas of memory, of which Linux grants a process 65,530; beyond that a
    program that is loaded ends the process.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.is_file() and len(maps.read_text().splitlines()) > 20_000:
        clear_programs()
        gc.collect()


class CompileCounter:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def counter() -> Iterator[CompileCounter]:
    """Programs that XLA has compiled, or read from disk, since the test began."""
    counter = CompileCounter()
    jax.monitoring.register_event_duration_secs_listener(counter)
    yield counter
    jax.monitoring.unregister_event_duration_listener(counter)


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama in the Hugging Face layout, without a tokenizer."""
    directory = tmp_path_factory.mktemp("tiny-llama")
    save_tiny("llama", directory)
    return directory


@pytest.fixture(scope="session")
def tiny_model(tiny_directory: Path) -> tuple:
    """That model in memory: (module, params), so that engines share what is compiled."""
    checkpoint = open_checkpoint(tiny_directory)
    return build_module(checkpoint.config, jax.numpy.float32), load_params(
        checkpoint, jax.numpy.float32
    )


@pytest.fixture(scope="module")
def shared_letters_llm(tiny_model: tuple) -> LLM:
    """That model with a tokenizer of letters, which knows 98 of its 128 ids."""
    return LLM(tiny_model, make_letters_tokenizer(), **MORE_LIMITS, max_logprobs=-1)


@pytest.fixture
def letters_llm(shared_letters_llm: LLM) -> Iterator[LLM]:
    """The same engine for the tests of a module; each must leave it empty."""
    yield shared_letters_llm
    check_is_empty(shared_letters_llm)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """The output of a JSON Lines job, not there yet."""
    return tmp_path / "out.jsonl"


@pytest.fixture(scope="session")
def text_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with the tokenizer and chat template of the embedded model."""
    directory = tmp_path_factory.mktemp("tiny-text")
    save_tiny("llama", directory, vocab_size=49152, num_hidden_layers=1)
    for path in open_checkpoint(None).directory.iterdir():
        if "token" in path.name or path.suffix == ".jinja":
            shutil.copy(path, directory)
    return directory


REAL_LIMITS: dict[str, Any] = {
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "max_model_len": 1024,
}


@pytest.fixture(scope="session")
def shared_real_llm() -> LLM:
    """The embedded model, in float32, with limits that make prompts wait and come in chunks."""
    return LLM(dtype="float32", **REAL_LIMITS)


@pytest.fixture
def real_llm(shared_real_llm: LLM) -> Iterator[LLM]:
    """The same engine for many tests; each must leave it empty."""
    yield shared_real_llm
    check_is_empty(shared_real_llm)


def check_is_empty(llm: LLM) -> None:
    """Asserts that nothing is queued, running or owned."""
    assert not llm.has_unfinished_requests()
    for engine in llm.engines:
        engine.scheduler.check()
    assert llm.metrics().num_used_pages == 0
    assert llm.metrics().num_running == llm.metrics().num_waiting == 0
    llm.step()  # reports the last finished ids, so that the runner lets go of their slots
    for engine in llm.engines:
        engine.runner.check_is_empty()
