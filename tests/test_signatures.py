"""Tests check shapes and types of signatures."""

import importlib
import sys

import numpy as np
import pytest
import signatures
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import TypeCheckError

PACKAGE = '''
"""A package."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

if TYPE_CHECKING:
    from nowhere import Thing

Rows = Float[np.ndarray, "n d"] | None


def add(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    return a + b


def double(a: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    return np.concatenate([a, a])


def outer(a: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Axes of what it calls are of their own sizes."""

    def inner(number: int):
        return number

    add(np.zeros((len(a) + 1, 2)), np.zeros((len(a) + 1, 2)))
    return inner("no number, and nobody else's business") and a


def count(a: Rows, names: list[str], thing: Thing = None) -> int:
    return 1


def parts(a: Float[np.ndarray, "n d"]) -> Iterator[Float[np.ndarray, " d"]]:
    yield from a


@dataclass(frozen=True)
class Pair:
    one: Float[np.ndarray, " n"]
    other: Float[np.ndarray, " n"]

    @property
    def total(self) -> Float[np.ndarray, "1"]:
        return self.one + self.other

    @staticmethod
    def of(length: int) -> Pair:
        return Pair(np.zeros(length), np.zeros(length))
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    (tmp_path / "watched").mkdir()
    (tmp_path / "watched" / "__init__.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [signatures.Finder(["watched"]), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "watched", raising=False)
    yield importlib.import_module("watched")
    del sys.modules["watched"]


def test_arguments_that_match_their_annotations_pass(package):
    assert package.add(np.ones((2, 3)), np.ones((2, 3))).shape == (2, 3)
    assert package.outer(np.ones(2)).tolist() == [1, 1]
    assert package.count(None, ["a"], thing=1) == 1
    assert len(list(package.parts(np.ones((2, 3))))) == 2
    assert package.Pair.of(1).total.tolist() == [0]


@pytest.mark.parametrize(
    "call",
    [
        lambda package: package.add(np.ones((2, 3)), np.ones((2, 4))),
        lambda package: package.add(np.ones((2, 3), int), np.ones((2, 3), int)),
        lambda package: package.double(np.ones(2)),
        lambda package: package.count(np.ones(2), []),
        lambda package: package.count(None, [1]),
        lambda package: package.parts(np.ones(2)),
        lambda package: package.Pair(np.ones(2), np.ones(3)),
        lambda package: package.Pair.of(2).total,
        lambda package: package.Pair.of(2.0),
    ],
    ids=["axis", "dtype", "return", "rank", "list", "generator", "dataclass", "property", "staticmethod"],
)
def test_what_does_not_fit_is_an_error(package, call):
    with pytest.raises((BeartypeCallHintViolation, TypeCheckError)):
        call(package)
