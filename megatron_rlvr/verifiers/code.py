"""Code: the program in the response passes all unit tests of the data row, in a sandbox.

The program is the last fenced block behind the thinking that is marked as Python, else the last unmarked one, else the
last, or the whole text where there is none. It is imported: what stands under ``if __name__ == "__main__"`` is not run.
The row's tests call its functions by value: arguments and results are plain data, and a function that returns another
object (a re.Match, a class of its own) fails its test. There is no network, only the standard library, and one small
folder to write in.
"""

from __future__ import annotations

import ast
import json
import re
import signal
from typing import Any

from megatron_rlvr.verdict import Verdict
from megatron_rlvr.verifiers import sandbox
from megatron_rlvr.verifiers.answer_text import after_thinking

ISOLATED = True  # waits for other processes
check_host = sandbox.check_host

_DEADLINE = 10.0  # seconds of CPU time, outside of a pool
_LONGEST = 200_000  # characters of a program
_FENCE = re.compile(r"^( *)```([a-zA-Z0-9+]*)[ ]*\r?\n(.*?)^ *```", re.DOTALL | re.MULTILINE)

_FUTURE = re.compile(r"^from __future__ import [\w, ]+$", re.MULTILINE)

_PASSIVE = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign)


def read_answer(value: Any) -> dict[str, str]:
    """{"prompt", "tests", "entry_point"} of a data row's tests; ValueError where they are none of these:

    a text or a list of assert statements; HumanEval's {"test", "entry_point"} with or without "prompt"; MBPP's
    {"test_list"} with or without "test_imports", MBPP+'s {"test"}; any of them as JSON text. Only HumanEval's prompt is
    the head of the program. Tests that nothing runs are none: every program would pass them.
    """
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        value = json.loads(value)
    if isinstance(value, str) or (isinstance(value, list) and all(isinstance(line, str) for line in value)):
        value = {"test_list": [value] if isinstance(value, str) else value}
    if not isinstance(value, dict) or not ("test" in value or "test_list" in value):
        raise ValueError(f"must be tests: asserts, or a mapping with test and entry_point, not {str(value)[:80]!r}")
    lists = [value.get(name) or [] for name in ("test_imports", "test_list")]  # null where other rows of a file have it
    imports, asserts = ([part] if isinstance(part, str) else part for part in lists)
    lines = [*imports, *asserts, value.get("test") or ""]
    texts = [value.get("prompt") or "", value.get("entry_point") or "", *lines]
    if not all(isinstance(text, str) for text in texts) or not any(line.strip() for line in lines):
        raise ValueError("holds no tests")
    answer = {"prompt": texts[0], "tests": "\n".join(lines), "entry_point": texts[1]}
    if not value.get("test") or not answer["entry_point"]:
        answer["prompt"] = ""  # MBPP's and MBPP+'s is prose
    try:
        tree = ast.parse(answer["tests"])
        compile(tree, "<tests>", "exec")
    except SyntaxError as error:
        raise ValueError(f"the tests are no Python: {error}") from error
    if not _is_run(tree, answer["entry_point"]):
        raise ValueError(
            "has tests that never run: they must assert something, or define check and name an entry_point"
        )
    return answer


def _is_run(tests: ast.Module, entry_point: str) -> bool:
    """Whether the tests run the program: by a statement of their own, or by check(candidate)."""
    for node in tests.body:
        if isinstance(node, ast.FunctionDef) and node.name == "check" and entry_point:
            return True
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if not is_text and not isinstance(node, _PASSIVE):
            return True
    return False


def verify(response: str, answer: dict[str, str]) -> Verdict:
    """Reward 1 where every test passes, else 0: also for a program that never ends, crashes or reaches for the machine.

    Raises sandbox.NoIsolation.
    """
    source = program(response)
    if not source.strip() or len(source) > _LONGEST:
        return Verdict(0.0, "unparseable", message="no program behind the thinking, or one of absurd length")
    deadline = signal.getitimer(signal.ITIMER_PROF)[0] or _DEADLINE  # what the pool has set for this answer
    # The prompt has the imports, and a head that a bare body continues; what must come first does.
    whole = "\n".join([*_FUTURE.findall(source), answer["prompt"], _FUTURE.sub("", source)])
    limits = sandbox.Limits(cpu_seconds=deadline)
    outcome = sandbox.run(whole, answer["tests"], answer["entry_point"], limits, given=answer["prompt"])
    return Verdict(float(outcome.passed), "ok", extracted=source, message=outcome.message)


def program(response: str) -> str:
    """Of the fenced blocks behind the thinking the last Python one: others may show output. Without any, all text."""
    text = after_thinking(response)
    blocks = [(mark, _outdent(block, indent)) for indent, mark, block in _FENCE.findall(text)]
    for marks in ({"python", "py", "python3"}, {""}):
        if marked := [block for mark, block in blocks if mark.lower() in marks]:
            return marked[-1]
    return blocks[-1][1] if blocks else "" if "```" in text else text


def _outdent(block: str, indent: str) -> str:
    """The lines of a block as far in as its fence is, in an item of a list, without that."""
    lines = block.split("\n")
    if not all(line.startswith(indent) or not line.strip() for line in lines):
        return block
    return "\n".join(line.removeprefix(indent) for line in lines)
