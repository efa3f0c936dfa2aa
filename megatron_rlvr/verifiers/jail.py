"""The inside of the sandbox: ``python -I -S jail.py``, standard library only, started by sandbox.py.

It takes itself out of the machine (own user, process, network, mount and IPC namespaces, an unprivileged uid, a root
folder that holds nothing but Python and one small writable folder, a filter on system calls, limits), then forks. The
fork runs the model's program; the first process of the new namespace runs the tests, calling the program's functions
through a pipe. So a program knows neither the tests nor what they expect, has no way to the result, and cannot return
an object that claims to equal everything: only plain values come through the pipe.

stdin: two length-prefixed JSON texts, {program, cpu_seconds, ...} and {tests, entry_point, given};
stdout: one JSON line.
"""

from __future__ import annotations

import ast
import builtins
import ctypes
import io
import json
import math
import os
import pickle
import platform
import resource
import select
import signal
import struct
import sys
import types
from typing import Any, ClassVar

_LIBC = ctypes.CDLL(None, use_errno=True)
_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 2, 4, 4096, 16384, 1 << 18
_PDEATHSIG, _DUMPABLE, _SECCOMP, _NO_NEW_PRIVS = 1, 4, 22, 38
_FILTER = 2
ROOT_UID = 0x70000000  # plus the process id: a uid that nobody else has, for limits count processes by uid
BOX = "/box"  # the one writable folder
# System calls that are refused, and the kernel's number of each: socket, kill, tkill, ptrace, process_vm_readv and
# _writev, unshare, setns, mount, umount2, chroot, add_key, request_key, keyctl, bpf, perf_event_open, userfaultfd,
# pidfd_send_signal, io_uring_setup.
_REFUSED = {
    "x86_64": (41, 62, 200, 101, 310, 311, 272, 308, 165, 166, 161, 248, 249, 250, 321, 298, 323, 424, 425),
    "aarch64": (198, 129, 130, 117, 270, 271, 97, 268, 40, 39, 51, 217, 218, 219, 280, 241, 282, 424, 425),
}
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_MOUNT_SETATTR = 442  # the same number on every architecture
_AT_RECURSIVE = 0x8000
# What a value that comes back may be made of, beside numbers, text, lists, tuples and dicts.
_PLAIN = {
    ("builtins", name) for name in ("set", "frozenset", "complex", "bytearray", "range", "slice", "Ellipsis")
} | {
    ("collections", "OrderedDict"), ("collections", "Counter"), ("collections", "deque"),
    ("collections", "defaultdict"),
    ("decimal", "Decimal"), ("fractions", "Fraction"), ("datetime", "date"), ("datetime", "datetime"),
    ("datetime", "time"), ("datetime", "timedelta"), ("builtins", "list"), ("builtins", "dict"), ("builtins", "int"),
}  # fmt: skip


def isolate(disk_mib: int) -> None:
    """Enter the namespaces and the empty root; this process's next child is the first of its process namespace.

    Raises OSError where the kernel or the container refuses.
    """
    _prctl(_PDEATHSIG, signal.SIGKILL)
    if _is_root():  # root sees files that the new uid will not, and is exempt from the limit of processes
        _unshare(_NEWNS)
        _build_root(disk_mib)
        uid = ROOT_UID + os.getpid()
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        _prctl(_DUMPABLE, 1)  # or /proc/self/uid_map stays root's
        _prctl(_PDEATHSIG, signal.SIGKILL)  # a change of uid takes it away
        _unshare(_NEWUSER | _NEWPID | _NEWNET | _NEWIPC | _NEWUTS)
        _map_ids(uid, uid)
    else:
        uid, gid = os.getuid(), os.getgid()
        _unshare(_NEWUSER | _NEWNS | _NEWPID | _NEWNET | _NEWIPC | _NEWUTS)
        _map_ids(uid, gid)
        _build_root(disk_mib)
    os.chroot(".")  # not pivot_root: inside a chroot the kernel makes no further user namespaces
    os.chdir(BOX)


def _is_root() -> bool:
    """Whether this is the machine's root, who can take another uid; a rootless container's root is a normal user.

    Raises OSError for the root of a namespace that root has made: it can neither take one nor be limited.
    """
    with open("/proc/self/uid_map") as file:
        inside, outside, count = file.readline().split()
    if os.geteuid() != 0 or count == "4294967295":
        return os.geteuid() == 0
    if inside == outside == "0":
        raise OSError(1, "root of a user namespace that root has made is exempt from the limit of processes")
    return False


def _map_ids(uid: int, gid: int) -> None:
    for name, line in (("setgroups", "deny"), ("uid_map", f"1000 {uid} 1"), ("gid_map", f"1000 {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(line)


def _build_root(disk_mib: int) -> None:
    """Python, the system's libraries and a few devices, read-only, and BOX; it becomes the working directory."""
    root = "/sys"  # a folder that is always there and of no use inside; what is mounted on it, this process alone sees
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", root, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=755")
    sources = ["/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", sys.base_prefix]
    devices = [f"/dev/{name}" for name in ("null", "zero", "urandom", "random")]
    for source in sources + devices:
        target = root + source
        if os.path.islink(source):
            os.symlink(os.readlink(source), target)
        elif os.path.exists(source) and not os.path.exists(target):
            os.makedirs(target if os.path.isdir(source) else os.path.dirname(target), mode=0o755, exist_ok=True)
            if not os.path.isdir(source):
                open(target, "w").close()
            _mount(source, target, None, _MS_BIND | _MS_REC)  # a user may not uncover what is mounted below
            if source not in devices:
                _read_only(target)
    os.makedirs(root + BOX, exist_ok=True)
    _read_only(root)
    _mount("tmpfs", root + BOX, "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={disk_mib}m,mode=777")
    os.chdir(root)


def _read_only(path: str) -> None:
    attributes = struct.pack("QQQQ", _MS_RDONLY, 0, 0, 0)
    result = _LIBC.syscall(_MOUNT_SETATTR, -100, path.encode(), _AT_RECURSIVE, attributes, len(attributes))
    _check(result, f"mount_setattr {path}")


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    encoded = [text.encode() if text is not None else None for text in (source, target, kind, data)]
    result = _LIBC.mount(encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3])
    _check(result, f"mount {target}")


def _unshare(flags: int) -> None:
    _check(_LIBC.unshare(flags), "unshare")


def _prctl(option: int, value: Any, more: Any = 0) -> None:
    _check(_LIBC.prctl(option, ctypes.c_ulong(value), more, 0, 0), f"prctl {option}")


def _check(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def drop_privileges() -> None:
    """No capabilities, no way to gain any, no system call of the refused ones; for this process and its children."""
    header, nothing = struct.pack("Ii", 0x20080522, 0), bytes(24)
    capset = {"x86_64": 126, "aarch64": 91}[platform.machine()]
    _check(_LIBC.syscall(capset, header, nothing), "capset")
    _prctl(_NO_NEW_PRIVS, 1)
    instruction = struct.Struct("HBBI").pack
    refused = _REFUSED[platform.machine()]
    program = [
        instruction(0x20, 0, 0, 4),  # load the architecture
        instruction(0x15, 1, 0, _AUDIT_ARCH[platform.machine()]),
        instruction(0x06, 0, 0, 0x80000000),  # another one: end the process
        instruction(0x20, 0, 0, 0),  # load the number
        instruction(0x35, len(refused) + 1, 0, 0x40000000),  # x32's numbers are refused as well
        *(instruction(0x15, len(refused) - index, 0, number) for index, number in enumerate(refused)),
        instruction(0x06, 0, 0, 0x7FFF0000),  # allow
        instruction(0x06, 0, 0, 0x00050001),  # fail with EPERM
    ]
    code = b"".join(program)
    buffer = ctypes.create_string_buffer(code)
    head = struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer))
    _prctl(_SECCOMP, _FILTER, ctypes.c_char_p(head))


def limit(cpu_seconds: float, memory_mib: int, processes: int) -> None:
    """Each process: CPU time, address space, file size, open files; together: the number of processes."""
    seconds, memory = math.ceil(cpu_seconds), memory_mib << 20
    for what, most in (
        (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, 16 << 20),
        (resource.RLIMIT_NOFILE, 64), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NPROC, processes),
    ):  # fmt: skip
        resource.setrlimit(what, (most, most))


class _PlainUnpickler(pickle._Unpickler):  # the one in Python, because C's keeps its opcodes to itself
    """Takes no attributes: a Counter with an ``__eq__`` of the program's choice would equal everything."""

    def load_build(self) -> None:
        raise pickle.UnpicklingError("returned a value with attributes of its own, which is no plain value")

    dispatch: ClassVar[dict[int, Any]] = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PLAIN:
            raise pickle.UnpicklingError(f"returned a {module}.{name}, which is no plain value")
        return super().find_class(module, name)


class Program:
    """The program in its own process; its functions are called through two pipes."""

    def __init__(self, source: str) -> None:
        calls, self._calls = os.pipe()
        self._replies, replies = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._calls)
            os.close(self._replies)
            _serve(source, calls, replies)
        os.close(calls)
        os.close(replies)
        self._end = os.pidfd_open(self.pid)
        self.names: list[str] = self._receive()

    def call(self, name: str, args: tuple, kwargs: dict) -> Any:
        """What the function returns or raises. Raises EOFError where the program has ended."""
        message = pickle.dumps((name, args, kwargs))
        _write(self._calls, struct.pack("Q", len(message)) + message)
        return self._receive()

    def _receive(self) -> Any:
        kind, value = _PlainUnpickler(io.BytesIO(_read_message(self._replies, self._end))).load()
        if kind == "raised":
            error = getattr(builtins, str(value[0]), None)
            known = isinstance(error, type) and issubclass(error, Exception)
            kind_of = error if known and error is not None else RuntimeError
            raise kind_of(str(value[1]))
        return value

    def ending(self) -> str:
        """How it ended, in words."""
        _, status = os.waitpid(self.pid, os.WNOHANG)
        if os.WIFSIGNALED(status):
            name = signal.Signals(os.WTERMSIG(status)).name
            return "out of CPU time" if name in ("SIGXCPU", "SIGKILL") else f"ended by {name}"
        return f"ended by itself with exit code {os.waitstatus_to_exitcode(status)}"


def _write(descriptor: int, data: bytes) -> None:
    try:
        while data:
            data = data[os.write(descriptor, data) :]
    except BrokenPipeError:
        raise EOFError from None


def _read_message(descriptor: int, end: int | None = None) -> bytes:
    size = struct.unpack("Q", _read_exactly(descriptor, 8, end))[0]
    if size > 64 << 20:
        raise EOFError("more than 64 MiB")
    return _read_exactly(descriptor, size, end)


def _read_exactly(descriptor: int, size: int, end: int | None) -> bytes:
    """``end``: a pidfd. What the program left running may hold its pipe open, so its own end counts."""
    data = b""
    while len(data) < size:
        if end is not None and descriptor not in select.select([descriptor, end], [], [])[0]:
            raise EOFError
        chunk = os.read(descriptor, size - len(data))
        if not chunk:
            raise EOFError
        data += chunk
    return data


def _serve(source: str, calls: int, replies: int) -> None:
    """The program's process: run it, then its functions as they are called. Never returns."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(nothing, descriptor)
    module = types.ModuleType("program")  # not __main__: a main guard may read input or leave
    sys.modules["program"], space = module, module.__dict__  # dataclasses look their module up
    try:
        exec(compile(source, "<program>", "exec"), space)
        _reply(replies, "value", [name for name, value in space.items() if callable(value)])
        while True:
            name, args, kwargs = pickle.loads(_read_message(calls))
            try:
                _reply(replies, "value", _plain(space[name](*args, **kwargs)))
            except Exception as error:
                _reply(replies, "raised", (type(error).__name__, str(error)[:200]))
    except EOFError:
        os._exit(0)
    except BaseException as error:
        _reply(replies, "raised", (type(error).__name__, str(error)[:200]))
        os._exit(1)


def _plain(value: Any) -> Any:
    """Iterators and views as lists: they cannot travel."""
    views: tuple[type, ...] = (type({}.keys()), type({}.values()), type({}.items()))
    return list(value) if isinstance(value, views) or hasattr(value, "__next__") else value


def _reply(descriptor: int, kind: str, value: Any) -> None:
    try:
        message = pickle.dumps((kind, value))
    except Exception as error:
        message = pickle.dumps(("raised", ("TypeError", f"cannot return it: {error}"[:200])))
    _write(descriptor, struct.pack("Q", len(message)) + message)


def run_tests(program: Program, tests: str, entry_point: str, given: str) -> None:
    """The tests, with the program's functions in their place; ``check(candidate)`` where there is an entry point.

    Of the row's own code ``given`` come its helpers: a program that defines them anew would judge itself.

    What Python has built in stays Python's: a ``set`` or ``abs`` of the program would decide what the tests compare.
    Raises whatever the first failing test raises.
    """
    used = {node.id for node in ast.walk(ast.parse(tests)) if isinstance(node, ast.Name)}
    wanted = {name for name in used if not hasattr(builtins, name)} | {entry_point}
    if not wanted & set(program.names):
        wanted = used  # an MBPP row asks for its own sum

    def proxy(source: Program, name: str) -> Any:
        return lambda *args, **kwargs: source.call(name, args, kwargs)

    space: dict[str, Any] = {name: proxy(program, name) for name in program.names if name in wanted}
    if helpers := wanted & _functions(given) - {entry_point}:
        own = Program(given)
        space |= {name: proxy(own, name) for name in helpers}
    if entry_point and entry_point not in space:
        raise NameError(f"the program defines no {entry_point}")
    exec(compile(tests, "<tests>", "exec"), space)
    if entry_point and callable(space.get("check")):
        space["check"](space[entry_point])


def _functions(source: str) -> set[str]:
    """The names of its functions; none of a text that is no program, as a head without a body is none."""
    try:
        return {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    except SyntaxError:
        return set()


def main() -> int:
    """0 with a JSON line {passed, message}; 3 with the reason on stderr where this machine gives no isolation."""
    job = json.loads(_read_message(0))
    try:
        isolate(job["disk_mib"])
        child = os.fork()
    except (OSError, KeyError) as error:
        print(f"no isolation: {error}", file=sys.stderr)
        return 3
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        _prctl(_PDEATHSIG, signal.SIGKILL)
        drop_privileges()
        _prctl(_DUMPABLE, 0)  # the program must not trace this process, which is of the same uid
    except (OSError, KeyError) as error:
        print(f"no isolation: {error}", file=sys.stderr)
        os._exit(3)
    limit(job["cpu_seconds"], job["memory_mib"], job["processes"])
    print(json.dumps(_judge(job["program"])), flush=True)
    os._exit(0)


def _judge(source: str) -> dict[str, Any]:
    program = None
    try:
        program = Program(source)
        tests = json.loads(_read_message(0))
        run_tests(program, tests["tests"], tests["entry_point"], tests["given"])
    except EOFError:
        return {"passed": False, "message": f"the program {program.ending() if program else 'ended before its tests'}"}
    except BaseException as error:  # an AssertionError, or whatever the program raised
        return {"passed": False, "message": f"{type(error).__name__}: {error}"[:300]}
    return {"passed": True, "message": ""}


if __name__ == "__main__":
    sys.exit(main())
