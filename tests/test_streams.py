"""What a program prints never ends it."""

import io
import os
import sys

import pytest

from experiment.cli import one_line_errors


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_program_goes_on_when_nobody_reads_its_words(name, monkeypatch):
    """With `| head`, or when the connection broke, a training ended without a checkpoint and scores were lost."""
    reader, writer = os.pipe()
    with os.fdopen(writer, "w", buffering=1) as stream:
        monkeypatch.setattr(sys, name, stream)
        with one_line_errors():
            print("read", file=getattr(sys, name))
            assert os.read(reader, 10) == b"read\n"
            os.close(reader)
            for _ in range(2):
                print("lost", file=getattr(sys, name), flush=True)
            steps = 3
    assert steps == 3


def test_characters_that_the_encoding_lacks_are_escaped(monkeypatch):
    """Scores with a ± were lost where the locale has none, as they are printed before they are written."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    with one_line_errors():
        print("0.5 ± 0.1, 模型")
    assert written.getvalue() == b"0.5 \\xb1 0.1, \\u6a21\\u578b\n"


def test_a_program_without_streams_runs(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with one_line_errors():
        print("to nobody")
    assert sys.stdout is None
