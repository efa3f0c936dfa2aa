"""The code verifier: what passes, what a program cannot do, and that whoever runs it survives."""

from __future__ import annotations

import json
import os
import platform
import random
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from megatron_rlvr.config import ConfigError
from megatron_rlvr.prompt_files import read_rows
from megatron_rlvr.verifiers import code, sandbox
from megatron_rlvr.verifiers.pool import VerifierPool
from megatron_rlvr.verifiers.sandbox import Limits, NoIsolation, Outcome, run

DATA = os.environ.get("MEGATRON_RLVR_DATA", "")
TIGHT = Limits(cpu_seconds=1.0)
ANSWER = code.read_answer("assert f(2) == 4")
DEF = "def f(x):\n    return 2 * x\n"

HOSTILE = {
    "endless loop": "while True:\n    pass",
    "fork bomb": "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
    "first failing fork": "import os\nwhile True:\n    os.fork()",
    "threads": "import threading, time\nfor i in range(999):\n"
    "    threading.Thread(target=time.sleep, args=(99,)).start()",
    "10 GB": "kept = bytearray(10 << 30)",
    "10 GB list": "kept = [0] * 10**10",
    "socket": "import socket\nsocket.socket()",
    "connection": "import urllib.request\nurllib.request.urlopen('http://1.1.1.1', timeout=1)",
    "write to /tmp": "open('/tmp/escaped', 'w').write('x')",
    "write to /usr": "open('/usr/escaped', 'w').write('x')",
    "write to /etc": "open('/etc/escaped', 'w').write('x')",
    "write to Python": "import os\nopen(os.__file__, 'a').write('x')",
    "fill the disk": "file = open('big', 'wb')\nwhile True:\n    file.write(bytes(1 << 20))",
    "kill the parent": "import os\nos.kill(os.getppid(), 9)",
    "kill all": "import os\nos.kill(-1, 9)",
    "other processes": "import os\nos.listdir('/proc')",
    "files of the user": "open(os.path.expanduser('~/.profile'))",
    "become root": "import os\nos.setuid(0)",
    "new namespace": "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "leave by itself": "import os\nos._exit(0)",
    "exit": "raise SystemExit(0)",
    "segmentation fault": "import ctypes\nctypes.string_at(0)",
    "a verdict on every descriptor": "import os\nfor i in range(64):\n    try:\n"
    "        os.write(i, b'{\"passed\": true, \"message\": \"\"}\\n')\n"
    "    except OSError:\n        pass\nos._exit(0)",
    "no syntax": "def f(:",
}  # fmt: skip


WALLS = """
import ctypes, os, resource
def f(name):
    library = ctypes.CDLL(None, use_errno=True)
    library.syscall(0x40000000 + 41, 2, 1, 0)  # x32's socket, which the list of refused ones does not name
    return {
        "x32": ctypes.get_errno(),
        "root": sorted(os.listdir("/")), "etc": os.listdir("/etc"), "secret": os.environ.get("SECRET"),
        "read-only": [bool(os.statvfs(path).f_flag & os.ST_RDONLY) for path in ("/", "/usr", os.__file__, "/box")],
        "most": [resource.getrlimit(getattr(resource, "RLIMIT_" + of)) for of in ("NOFILE", "FSIZE", "NPROC", "AS")],
    }[name]
"""


def test_the_walls_of_the_sandbox(monkeypatch):
    """What HOSTILE runs into; one wall behind another is not seen by what meets the first."""
    monkeypatch.setenv("SECRET", "a token of the user's")
    top = {"bin", "box", "dev", "etc", "lib", "lib64", "usr", sys.base_prefix.split("/")[1]}
    top = [name for name in sorted(top) if name == "box" or os.path.lexists(f"/{name}")]
    most = [(value, value) for value in (64, 16 << 20, 16, 1024 << 20)]
    found: dict[str, object] = {"x32": 1} if platform.machine() == "x86_64" else {}
    found |= {"root": top, "etc": ["ld.so.cache"], "secret": None}
    found |= {"read-only": [True, True, True, False], "most": most}
    for name, wanted in found.items():
        assert run(WALLS, f"assert f({name!r}) == {wanted!r}, f({name!r})", "", TIGHT) == Outcome(True, ""), name


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", HOSTILE)
def test_whatever_a_program_tries_is_a_failed_test(name):
    outcome = run(f"import os\n{HOSTILE[name]}\n{DEF}", "assert f(2) == 4", "", TIGHT)
    assert outcome.passed is False and outcome.message
    assert psutil.Process().children(recursive=True) == []
    assert not any(Path(folder, "escaped").exists() for folder in ("/tmp", "/usr", "/etc"))


@pytest.mark.parametrize("main", ["n = int(input())", "import unittest\n    unittest.main()", "raise SystemExit(1)"])
def test_a_program_is_imported_and_not_run_as_main(main):
    data = "from dataclasses import dataclass\n@dataclass\nclass Pair:\n    x: 'int' = 2\n"
    source = f"{data}def f(x):\n    return Pair().x * x\nif __name__ == '__main__':\n    {main}\n"
    assert run(source, "assert f(2) == 4", "", TIGHT).passed
    assert not run(source, "assert f(2) == 5", "", TIGHT).passed


@pytest.mark.parametrize(
    "source",
    [
        "class Same:\n    def __eq__(self, other):\n        return True\ndef f(x):\n    return Same()",
        "class Five(int):\n    def __eq__(self, other):\n        return True\ndef f(x):\n    return Five(5)",
        "import gc\ndef f(x):\n"
        "    found = [o for o in gc.get_objects() if '='.join(['', '', ' 4']) in str(o)]\n    return 4 if found else 5",
        "import builtins\nbuiltins.AssertionError = Exception\nclass f:\n    def __new__(cls, x):\n        return 5",
        "def f(x):\n    import sys\n    for frame in sys._current_frames().values():\n"
        "        while frame:\n            if 'tests' in frame.f_locals:\n                return 4\n"
        "            frame = frame.f_back\n    return 5",
    ],
)
def test_a_program_cannot_pretend(source):
    assert run(source, "assert f(2) == 4", "", TIGHT).passed is False
    assert run(source + "\ndef f(x):\n    return 4", "assert f(2) == 4", "", TIGHT).passed is True


# A reply in place of the pickled one: BUILD gives an empty Counter the attribute __eq__, which slice() is called as.
FORGED = r"""
import pickle
dumps = pickle.dumps
forged = (b"\x80\x02X\x05\0\0\0valueccollections\nCounter\n(N}X\x06\0\0\0__eq__cbuiltins\nslice\nstb\x29\x81\x86.")
pickle.dumps = lambda reply: forged if reply[0] == "value" and not isinstance(reply[1], list) else dumps(reply)
def f(x):
    return 0
"""


def test_a_forged_reply_is_no_value():
    outcome = run(FORGED, "assert f(2) == 4\nassert f(3) == 'abc'\nassert [1, 2] == f(1)", "", TIGHT)
    assert not outcome.passed and "no plain value" in outcome.message


def test_plain_values_come_back_as_they_are():
    imports = "import collections, datetime, decimal, fractions\n"
    values = (
        "[None, True, 2, 2.5, 1j, 'x', b'x', bytearray(b'x'), [(1,)], {'a': {1}}, frozenset([1]), range(3), slice(1),\n"
        "collections.Counter('aab'), collections.OrderedDict(a=1), collections.deque([1], 3),\n"
        "collections.defaultdict(int, {1: 2}), fractions.Fraction(1, 3), decimal.Decimal('1.5'),\n"
        "datetime.date(2020, 1, 2), datetime.datetime(2020, 1, 2), datetime.time(3), datetime.timedelta(3), Ellipsis]"
    )
    source = f"{imports}def f():\n    return {values}"
    assert passes(source, f"{imports}a, b = f(), {values}\nassert a == b and [*map(type, a)] == [*map(type, b)]")


def passes(source: str, tests: str, entry_point: str = "") -> bool:
    return run(source, tests, entry_point, TIGHT).passed


def test_the_tests_keep_pythons_own_functions():
    wrong = "def f(x):\n    return [1.0]\n"
    assert not passes(wrong + "def set(x):\n    return 0", "assert set(f(2)) == set((7, 8))")
    assert not passes(wrong + "def all(x):\n    return True", "assert all([f(1) == 2, f(2) == 4])")
    check = "def check(candidate):\n    assert abs(candidate(3)[0] - 9.25) < 1e-6"
    assert not passes(wrong + "def abs(x):\n    return 0", check, "f")
    helper = "def sum(a, b):\n    return a + b\ndef f(x):\n    return [x, sum(x, 1)]"
    assert passes(helper, "assert sum(f(2)) == 5")
    own = "def sum(a, b):\n    return a + b"
    assert passes(own, "import math\nassert math.isclose(sum(1, 2), 3)\nassert [sum(i, 1) for i in (1, 2)] == [2, 3]")
    for tests, entry_point in (("assert sum(2, 1) == 3", ""), ("def check(g):\n    assert g(2, 1) == 3", "sum")):
        assert passes(helper, tests, entry_point)  # the function that the row asks for is called so


def test_what_passes_and_what_does_not():
    def judge(response, answer=ANSWER):
        verdict = code.verify(response, answer)
        return verdict.reward, verdict.status

    assert judge(DEF) == (1.0, "ok")
    assert judge(f"<think>```python\nwrong\n```</think>Here:\n```python\n{DEF}```\nDone.") == (1.0, "ok")
    assert judge(f"```\ndef f(x): return 5\n```\nBetter:\n```py\n{DEF}```") == (1.0, "ok")
    assert judge(f"```python\n{DEF}```\n```python\ndef f(x): return 5\n```") == (0.0, "ok")
    assert judge(f"```\n{DEF}```\n```\ndef f(x): return 5\n```") == (0.0, "ok")
    assert judge(f"```python\ndef f(x): return 5\n```\n```\n{DEF}```") == (0.0, "ok")
    assert judge(f"```Python\n{DEF}```\nOutput:\n```\n4\n```") == (1.0, "ok")
    assert judge(f"```\n{DEF}```\nRun it:\n```bash\npython f.py\n```") == (1.0, "ok")
    assert judge(f"```py3\n{DEF}```") == (1.0, "ok")
    listed = "".join(f"   {line}\n" for line in ["```python", *DEF.splitlines(), "```"])
    assert judge(f"1. Write it:\n\n{listed}2. Run it.") == (1.0, "ok")  # the item of a list
    assert judge(f"  ```python\n{DEF}  ```") == (1.0, "ok")
    assert judge(f"open('mine', 'w').write('4')\n{DEF}") == (1.0, "ok")  # its own folder
    assert judge("def g(x): return 4") == (0.0, "ok")
    for response in ("", "  ", "```python\ndef f(x): return 4", "<think>" + DEF, "#" * 300_000):
        assert judge(response) == (0.0, "unparseable")
    head = 'from math import prod\ndef f(x: int) -> int:\n    """Twice x."""\n'
    answer = code.read_answer({"prompt": head, "entry_point": "f", "test": "def check(c):\n    assert c(2) == 4"})
    assert judge("    return prod([2, x])\n", answer) == (1.0, "ok")  # a bare body goes on behind the head
    assert judge("def f(x): return prod([2, x])", answer) == (1.0, "ok")
    assert judge("    return x\n", answer) == (0.0, "ok")
    later = "from __future__ import annotations\ndef f(x: Whatever) -> int: return prod([2, x])"
    assert judge(later, answer) == (1.0, "ok")  # what Python wants first comes first
    head = 'def coded(s: str) -> str:\n    return s[::-1]\n\ndef f(s: str) -> str:\n    """Undo coded."""\n'
    test = "def check(c):\n    assert c(coded('ab')) == 'ab'"
    answer = code.read_answer({"prompt": head, "entry_point": "f", "test": test})
    assert judge("    return s[::-1]\n", answer) == (1.0, "ok")
    assert judge("def coded(s): return s\ndef f(s): return s", answer) == (0.0, "ok")  # the helper is the row's
    answer = code.read_answer(
        {"prompt": "def f(x):\n", "entry_point": "f", "test": "def check(c):\n    assert c(2) == 4"}
    )
    assert judge("    return 2 * x", answer) == (1.0, "ok")  # a head that is no program
    raising = code.read_answer("try:\n    f(0)\nexcept ZeroDivisionError:\n    pass\nelse:\n    assert False")
    assert judge("def f(x): return 1 / x", raising) == (1.0, "ok") and judge("def f(x): return 1", raising) == (
        0.0,
        "ok",
    )
    kinds = code.read_answer("assert f({1, 2}) == [(1, 2.5), {'a': None}, {3}, b'x', 1j, True]")
    assert judge("def f(x): return [(1, 2.5), {'a': None}, {3}, b'x', 1j, len(x) == 2]", kinds) == (1.0, "ok")


def test_tests_of_data_rows():
    asserts = ["assert f(1) == 2", "assert f(2) == 4"]
    expected = {"prompt": "", "tests": "assert f(1) == 2\nassert f(2) == 4\n", "entry_point": ""}
    for value in (asserts, {"test_list": asserts, "prompt": "Double it."}, json.dumps(asserts)):
        assert code.read_answer(value) == expected
    plus = {"prompt": "Double it.", "test_list": asserts[:1], "test": asserts[1]}  # MBPP+: prose, and no entry point
    assert code.read_answer(plus) == expected | {"tests": "\n".join(asserts)}
    assert code.verify(DEF, code.read_answer(plus | {"test_list": []})).reward == 1.0
    null = {"test": None, "prompt": None, "entry_point": None, "test_imports": None, "test_list": asserts}
    assert code.read_answer(null) == expected | {"tests": "assert f(1) == 2\nassert f(2) == 4\n"}
    of_text = code.read_answer({"test_imports": "import math", "test_list": "assert f(2) == math.sqrt(16)"})
    assert code.verify(DEF, of_text).reward == 1.0
    for value in ("", [], {}, 3, None, {"test_list": []}, "no tests here", {"test": 3}, "{not json", "return 1"):
        with pytest.raises(ValueError):
            code.read_answer(value)


CHECK = "METADATA = {'author': 'jt'}\n\ndef check(candidate):\n    assert candidate(2) == 4\n"


def test_tests_that_nothing_runs_are_refused():
    assert code.read_answer({"test": CHECK, "entry_point": "f"})["entry_point"] == "f"
    assert code.read_answer(f"{CHECK}check(f)")["entry_point"] == ""
    nothing = "'a text'\nimport math\nclass A:\n    pass\nx: int = 3\ndef test():\n    assert f(2) == 4\n"
    for value in (CHECK, [CHECK], {"test": CHECK}, nothing, {"test": nothing, "entry_point": "f"}):
        with pytest.raises(ValueError, match="tests that never run"):
            code.read_answer(value)


def test_through_the_pool_a_program_that_hangs_is_wrong_and_no_timeout():
    programs = [
        DEF,
        "while True: pass",
        "import time\ntime.sleep(600)",
        "import os\nos.kill(os.getppid(), 9)",
        DEF + "\n",
    ]
    with VerifierPool("code", workers=2, deadline=1.0) as pool:
        verdicts = pool.score([(source, ANSWER) for source in programs])
    assert [verdict.status for verdict in verdicts] == ["ok"] * 5
    assert [verdict.reward for verdict in verdicts] == [1.0, 0.0, 0.0, 0.0, 1.0]
    assert "wall time" in verdicts[2].message and psutil.Process().children(recursive=True) == []


def test_without_isolation_it_does_not_start_and_says_why(monkeypatch):
    def refused(*_):
        raise NoIsolation("no isolation: unshare: Operation not permitted")

    monkeypatch.setattr(sandbox, "run", refused)
    with pytest.raises(ConfigError, match="without isolation.*unshare: Operation not permitted.*max_user_namespaces"):
        VerifierPool("0.5*code + 0.5*format", workers=1, deadline=1.0)


def test_the_kernels_refusal_reaches_the_caller():
    limited = (
        "import os\nopen('/proc/sys/user/max_user_namespaces', 'w').write('0')\n"  # of a namespace, not of the machine
    )
    script = (
        "import sys\nfrom megatron_rlvr.verifiers import sandbox\n" + limited + "try:\n"
        "    sandbox.run('', '', '', sandbox.Limits())\nexcept sandbox.NoIsolation as error:\n    print(error)\n"
    )
    command = ["unshare", "--user", "--map-root-user", sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    reason = "exempt from the limit of processes" if os.getuid() == 0 else "unshare"
    assert done.stdout.startswith("no isolation: ") and reason in done.stdout, done.stderr


@pytest.mark.parametrize("below_usr", [False, True], ids=["", "with a mount below /usr"])
def test_a_normal_user_can_run_it_too(tmp_path, below_usr):
    """In a fork that has become nobody; Python itself may lie where only root can read, so any readable one will do.

    The second time with a folder mounted below /usr, as container runtimes do it with the GPU's driver.
    """
    if os.getuid() != 0:
        pytest.skip("this test run is by a normal user: the others show it")
    tmp_path.chmod(0o777)  # so that it is the read-only mount that keeps a program from writing
    mount = ["unshare", "--mount", "sh", "-c", 'mount --bind "$0" /usr/share && exec "$@"', str(tmp_path)]
    script = (
        "import encodings.idna, os, selectors, sys\nfrom megatron_rlvr.verifiers.sandbox import Limits, run\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "sys.executable = next((p for p in (sys.executable, '/usr/bin/python3') if os.access(p, os.X_OK)), 'none')\n"
        "if sys.executable == 'none': print('none'); sys.exit()\n"
        "print(run('def f(): return 1', 'assert f() == 1', '', Limits()).passed,\n"
        "      run('import os\\ndef f(): return os.getuid()', 'assert f() == 0', '', Limits()).passed,\n"
        "      run('open(\"/usr/share/x\", \"w\")', 'assert 1', '', Limits()).message,\n"
        "      run('import socket\\nsocket.socket()', 'assert 1', '', Limits()).message)\n"
    )
    command = [*(mount if below_usr else []), sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.stdout.strip() == "none":
        pytest.skip("no Python that a normal user may run")
    assert re.match("True False OSError: .*Read-only.* PermissionError", done.stdout), done.stdout + done.stderr


def human_eval() -> list[dict]:
    rows = [row for _, row in read_rows(Path(DATA, "other/HumanEval.jsonl.gz"))]
    assert len(rows) == 164
    return rows


def check_solutions(rows: list[dict]) -> None:
    items = [(row["canonical_solution"], code.read_answer(row)) for row in rows]
    items += [("    return None\n", answer) for _, answer in items]
    with VerifierPool("code", workers=2, deadline=20.0) as pool:
        verdicts = pool.score(items)
    assert [(row["task_id"], v.message) for row, v in zip(rows, verdicts, strict=False) if v.reward != 1.0] == []
    assert [v.message for v in verdicts[len(rows) :] if v.reward or v.status != "ok"] == []


@pytest.mark.real_data
def test_canonical_solutions_of_humaneval_pass_and_none_is_no_solution():
    check_solutions(random.Random(0).sample(human_eval(), 30))


@pytest.mark.slow
@pytest.mark.real_data
def test_all_canonical_solutions_of_humaneval_pass():
    check_solutions(human_eval())
