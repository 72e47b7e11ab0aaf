"""Compiled programs: shared, found again by shape, and rid of what they were compiled from."""

import gc
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folojax.compile.programs import IN_GRAPH, Compiling, Programs, clear_programs, run


class Counted:
    """A function that counts how often it is traced."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, x: Any, y: Any, *, factor: int = 1) -> Any:
        self.count += 1
        return {"sum": x + factor * y, "given": y}


@pytest.fixture
def counted() -> Any:
    counter = Counted()

    def add(x: Any, y: Any, *, factor: int) -> Any:
        return counter(x, y, factor=factor)

    return counter, Programs(add)


def test_a_shape_is_compiled_once(counted: Any) -> None:
    counter, programs = counted
    program = programs.of(factor=2)
    out = program(jnp.arange(3), np.arange(3, dtype=np.int32))
    assert out["sum"].tolist() == [0, 3, 6]
    assert program(np.ones(3, np.int32), jnp.arange(3))["sum"].tolist() == [1, 3, 5]
    assert counter.count == 1
    assert program(np.ones(2, np.int32), jnp.arange(2))["sum"].tolist() == [1, 3]
    assert program(np.ones(2), jnp.arange(2))["sum"].tolist() == [1.0, 3.0]
    assert counter.count == 3


def test_static_arguments_choose_the_program(counted: Any) -> None:
    counter, programs = counted
    assert programs.of(factor=2) is programs.of(factor=2)
    assert programs.of(factor=3)(np.ones(1), np.ones(1))["sum"].tolist() == [4.0]
    assert programs.of(factor=2)(np.ones(1), np.ones(1))["sum"].tolist() == [3.0]
    assert counter.count == 2


def test_what_is_compiled_for_shapes_is_what_a_call_runs(counted: Any) -> None:
    counter, programs = counted
    program, compiling = programs.of(factor=1), Compiling()
    shape = jax.ShapeDtypeStruct((4,), jnp.float32, sharding=jnp.ones(4).sharding)
    found = compiling(program, (shape, shape))
    assert (found["sum"].shape, found["sum"].dtype) == ((4,), jnp.float32)
    assert counter.count == 1
    (compiled,) = compiling.compiled
    assert compiled.memory_analysis() is not None
    args = np.ones(4, np.float32), jnp.ones(4, jnp.float32)
    assert run(program, args)["sum"].tolist() == [2.0] * 4
    assert compiling(program, args)["sum"].shape == (4,)
    assert compiling.compiled == [compiled]
    assert counter.count == 1


def test_what_a_key_stands_for_is_looked_at_once(counted: Any) -> None:
    counter, programs = counted
    program, mine, other = programs.of(factor=1), object(), object()
    args, more = (np.ones(4), np.ones(4)), (np.ones(3), np.ones(3))
    for _ in range(2):
        assert run(program, args, mine)["sum"].tolist() == [2.0] * 4
        assert run(program, more, other)["sum"].tolist() == [2.0] * 3
    with pytest.raises(TypeError, match="compiled"):
        run(program, more, mine)
    clear_programs()
    assert run(program, more, mine)["sum"].tolist() == [2.0] * 3
    assert counter.count == 3


def test_a_weak_type_is_no_other_shape(counted: Any) -> None:
    counter, programs = counted
    weak = jnp.asarray(1.0) * jnp.asarray(2.0)
    assert jnp.asarray(2.0).weak_type
    for x in (weak, jnp.asarray(2.0), np.float32(2.0), jnp.full((), 2.0, jnp.float32)):
        assert programs.of(factor=1)(x, jnp.ones(()))["sum"].tolist() == 3.0
    assert counter.count == 1


def test_arguments_keep_their_names(counted: Any) -> None:
    _, programs = counted
    text = programs.of(factor=1).lower(np.ones(1), np.ones(1)).as_text("hlo")
    assert "add(x.1, y.1)" in text


def test_loops_are_in_the_graph_on_one_device_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    given = list[str]()

    def jit(function: Any, **options: Any) -> Any:
        given.append(options["compiler_options"]["xla_gpu_enable_command_buffer"])
        return real(function)

    real = jax.jit
    monkeypatch.setattr(jax, "jit", jit)
    program = Programs(lambda x: x + 1, compiler_options=IN_GRAPH).of()
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
    over = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    for x in (jnp.ones(8), jax.device_put(jnp.ones(8), over)):
        program.lower(x)
    assert ["WHILE" in one for one in given] == [True, False]
    assert all("COLLECTIVES" in one for one in given)


def test_donated_arguments_are_gone() -> None:
    programs = Programs(lambda x, y: (x + y, y), donate=(0,))
    x, y = jnp.ones(8), jnp.ones(8)
    total, same = programs.of()(x, y)
    assert x.is_deleted()
    assert not y.is_deleted()
    assert (total.sum(), same.sum()) == (16, 8)


def test_nothing_is_kept_of_a_trace() -> None:
    """What is traced, and with it what JAX keeps for as long as that lives."""
    traced = []

    def function(x: Any) -> Any:
        class Mark:
            pass

        mark = Mark()
        traced.append(weakref.ref(mark))

        @jax.custom_jvp
        def inner(x: Any) -> Any:
            return (x, mark)[0] + 1

        inner.defjvp(lambda primals, tangents: (inner(*primals), tangents[0]))
        return inner(x)

    programs = Programs(function)
    assert programs.of()(jnp.ones(2)).tolist() == [2.0, 2.0]
    gc.collect()
    assert [ref() for ref in traced] == [None]
    assert programs.of()(jnp.ones(2)).tolist() == [2.0, 2.0]
    assert len(traced) == 1


def test_programs_are_forgotten_when_asked(counted: Any) -> None:
    counter, programs = counted
    programs.of(factor=1)(np.ones(1), np.ones(1))
    clear_programs()
    programs.of(factor=1)(np.ones(1), np.ones(1))
    assert counter.count == 2
