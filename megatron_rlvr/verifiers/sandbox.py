"""A program and its tests, run where they can harm nothing: in a fresh process that jail.py takes out of the machine.

Linux on x86-64 or 64-bit ARM. As root it takes a uid of its own, as a normal user it needs a kernel that lets users
make namespaces; in a container both may be forbidden, and then check_host says so.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_rlvr.config import ConfigError

_JAIL = str(Path(__file__).with_name("jail.py"))
_WALL = 3.0  # wall time, in CPU limits; below the pool's, so that an endless sleep is a failed program and no timeout
_REFUSED = 3  # jail.py's exit code where there is no isolation


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    cpu_seconds: float = 10.0  # per process
    memory_mib: int = 1024  # address space, per process
    disk_mib: int = 16  # in its folder
    processes: int = 16  # together, threads included, those of the sandbox too


@dataclass(frozen=True)
class Outcome:
    passed: bool
    message: str  # the first test that failed, or how the program ended


class NoIsolation(RuntimeError):
    """This machine does not let a process be isolated; the message is the kernel's."""


def run(program: str, tests: str, entry_point: str, limits: Limits, given: str = "") -> Outcome:
    """Run ``tests`` against the functions of ``program``; returns when all of its processes are gone.

    What the tests use beside ``entry_point`` they take from ``given``, the row's own code, where that has it. Raises
    NoIsolation.
    """
    job = {**vars(limits), "program": program}
    request = _packed(job) + _packed({"tests": tests, "entry_point": entry_point, "given": given})
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "PATH") if name in os.environ}
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", _JAIL],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**kept, "LANG": "C.UTF-8"},
    )
    try:
        reply, errors = process.communicate(request, timeout=_WALL * limits.cpu_seconds)
    except subprocess.TimeoutExpired:
        process.kill()  # the kernel ends everything inside with it
        process.communicate()
        return Outcome(False, f"not done in {_WALL * limits.cpu_seconds:g} s of wall time")
    if process.returncode == _REFUSED:
        raise NoIsolation(errors.decode(errors="replace").strip())
    if not reply:  # the tests' own process met a limit
        return Outcome(
            False, f"the sandbox ended early, exit code {process.returncode}: {errors[-200:].decode(errors='replace')}"
        )
    return Outcome(**json.loads(reply))


def _packed(value: dict) -> bytes:
    text = json.dumps(value).encode()
    return struct.pack("Q", len(text)) + text


def check_host() -> None:
    """Raise ConfigError, with the kernel's reason and the way out, where nothing can be isolated on this machine."""
    try:
        outcome = run("def f(): return 1", "assert f() == 1", "", Limits())
    except NoIsolation as error:
        raise ConfigError(
            f"verifier=code does not run programs of a model without isolation, which this machine refuses: "
            f"{error}. Let processes make user namespaces (sysctl user.max_user_namespaces, and "
            f"kernel.apparmor_restrict_unprivileged_userns=0 on Ubuntu; in a container a seccomp profile that allows "
            f"unshare and mount), or score elsewhere with tools/verify.py"
        ) from error
    if not outcome.passed:
        raise ConfigError(f"verifier=code: a trivial program fails in the sandbox of this machine: {outcome.message}")
