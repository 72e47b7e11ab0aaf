"""Kernels in C++: compiled once, and not at all where that is impossible."""

import _ctypes
from pathlib import Path

import pytest

from folojax.models.machine import compiler as native


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FOLOJAX_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "some_kernel.cc"
    path.write_text("// What a compiler makes of it is up to the test.\n")
    return path


def test_it_is_compiled_once_and_again_if_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Path
) -> None:
    """With a compiler that counts its calls and gives a library that loads."""
    compiler, calls = tmp_path / "compiler", tmp_path / "calls"
    compiler.write_text(
        f'#!/bin/sh\nfor target; do :; done\necho >>{calls}\ncp {_ctypes.__file__} "$target"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    library = native.build_library(source)
    assert library.is_relative_to(tmp_path / "cache")
    assert native.build_library(source) == library
    assert len(calls.read_text()) == 1
    library.write_bytes(b"damaged")
    native.load(source)
    assert len(calls.read_text()) == 2
    assert library.read_bytes() == Path(_ctypes.__file__).read_bytes()
    source.write_text("// Another one.\n")
    assert native.build_library(source) != library


def test_what_does_not_compile_is_not_called(source: Path) -> None:
    source.write_text("this is no C++\n")
    problem = native.register(source, "folojax_some_kernel", "SomeKernel")
    assert problem is not None
    assert "error" in problem
    assert "install g++ or clang++, or set CXX" in problem
