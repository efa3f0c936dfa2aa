"""A file that cannot be imported is one error with its name and line."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from megatron_rlvr.config import ConfigError
from megatron_rlvr.loading import loading


@pytest.mark.parametrize(
    "text, found",
    [
        (b"x = 1\ndef verify(response, answer)\n", "line 2: SyntaxError: expected ':'"),
        (b"x = 1\nif x:\ny = 2\n", "line 3: IndentationError: expected an indented block"),
        (b"\nimport no_such_package\n", "line 2: ModuleNotFoundError: No module named 'no_such_package'"),
        (b"def make():\n    return later\n\nmake()\n", "line 2: NameError: name 'later' is not defined"),
        (b"import json\n\njson.loads('{')\n", "line 3: JSONDecodeError: "),  # raised elsewhere, called here
    ],
)
def test_what_is_wrong_in_a_file_is_one_error(tmp_path: Path, text: bytes, found: str) -> None:
    own = tmp_path / "own.py"
    own.write_bytes(text)
    with pytest.raises(ConfigError) as raised, loading("verifier 'own.py'", own):
        runpy.run_path(str(own))
    assert str(raised.value).startswith(f"verifier 'own.py' cannot be loaded: {own}, {found}")
    assert str(raised.value).endswith("Mend the file, or install what it imports")


def test_a_mistake_in_what_it_imports_is_named_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "helping_own.py").write_text("x = 1\n(\n")
    (tmp_path / "own.py").write_text("import helping_own\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"helping_own.py, line 2: SyntaxError"), loading("it", tmp_path / "own.py"):
        runpy.run_path(str(tmp_path / "own.py"))
    assert "helping_own" not in sys.modules


def test_a_file_that_cannot_be_read_has_no_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="own.py: FileNotFoundError: "), loading("it", tmp_path / "own.py"):
        (tmp_path / "own.py").read_text()
