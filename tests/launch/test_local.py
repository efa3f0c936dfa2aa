"""The ranks of one machine end together: with real processes that know nothing of training."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_rlvr.launch import local
from megatron_rlvr.launch.local import run_ranks
from megatron_rlvr.processes import free_port

ROOT = Path(__file__).parents[2]


def ranks(body: str, count: int = 2) -> int:
    script = f"import os, sys, time\nrank = int(os.environ['RANK'])\n{body}"
    return run_ranks([sys.executable, "-c", script], count, port=0, extra={})


def test_a_free_port_is_none_that_a_connection_gets_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert all(1024 <= free_port() < lowest for _ in range(50))
    with socket.socket() as held:
        held.bind(("127.0.0.1", taken := free_port()))
        held.listen()
        other = free_port()
        draws = iter([taken, other])
        monkeypatch.setattr("secrets.randbelow", lambda count: next(draws) - 20000)
        assert free_port() == other


def test_every_rank_knows_its_place() -> None:
    places = "assert (os.environ['WORLD_SIZE'], os.environ['EXTRA']) == ('3', 'yes') and rank in (0, 1, 2)\n"
    places += "assert os.environ['LOCAL_RANK'] == os.environ['RANK']"
    assert (
        run_ranks(
            [sys.executable, "-c", f"import os\nrank = int(os.environ['RANK'])\n{places}"], 3, 0, {"EXTRA": "yes"}
        )
        == 0
    )


def test_a_rank_that_fails_ends_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    """Whichever it is, and however it ends: the launcher neither waits for the rest nor hides the code."""
    for victim in (0, 1):
        started = time.monotonic()
        assert ranks(f"sys.exit(3) if rank == {victim} else time.sleep(300)") == 3
        assert ranks(f"os.kill(os.getpid(), 9) if rank == {victim} else time.sleep(300)") == 137
        assert time.monotonic() - started < 60
        assert capsys.readouterr().err == f"error: rank {victim} was killed by SIGKILL\n"


@pytest.fixture
def stop_when_ready(tmp_path: Path) -> Callable[..., int]:
    """stop_when_ready(body, *signals) -> the exit code of two ranks that note signals in ``got``, and were sent these.

    The launcher's clock runs a thousand times too fast, so that a deadline of two minutes would have passed at once.
    """
    notes = "import signal\ngot = []\n"
    notes += "for name in ('TERM', 'USR1', 'INT'):\n"
    notes += "    signal.signal(getattr(signal, f'SIG{name}'), lambda number, frame: got.append(number))\n"
    notes += f"folder = {str(tmp_path)!r}\nopen(f'{{folder}}/ready_{{rank}}', 'w').close()\n"
    notes += "while not got: time.sleep(0.05)\n"

    def send(numbers: tuple[int, ...]) -> None:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("ready_*"))) < 2:
            if time.monotonic() > deadline:
                return
            time.sleep(0.05)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.3)

    def run(body: str, *numbers: int) -> int:
        with pytest.MonkeyPatch.context() as patch:
            fast = SimpleNamespace(monotonic=lambda: 1000 * time.monotonic(), sleep=time.sleep)
            patch.setattr(local, "time", fast)
            thread = threading.Thread(target=send, args=(numbers,))
            thread.start()
            code = ranks(notes + body)
            thread.join()
        return code

    return run


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_ranks_that_are_asked_to_stop_have_the_time_of_their_step(
    stop_when_ready, tmp_path: Path, number: signal.Signals
) -> None:
    body = "time.sleep(1.5 * rank)\nopen(f'{folder}/saved_{rank}', 'w').close()\nsys.exit(128 + got[0])"
    assert stop_when_ready(body, number) == 128 + number
    assert len(list(tmp_path.glob("saved_*"))) == 2


def test_a_second_signal_kills(stop_when_ready, capsys: pytest.CaptureFixture[str]) -> None:
    assert stop_when_ready("time.sleep(300)", signal.SIGINT, signal.SIGINT) == 128 + signal.SIGKILL
    assert capsys.readouterr().err == "stopping after this step; once more to stop at once\n"


def test_a_rank_that_fails_while_it_stops_has_not_saved(stop_when_ready, capsys: pytest.CaptureFixture[str]) -> None:
    body = "os.kill(os.getpid(), 9) if rank == 1 else time.sleep(300)"
    assert stop_when_ready(body, signal.SIGUSR1) == 128 + signal.SIGKILL
    assert capsys.readouterr().err.endswith("error: rank 1 was killed by SIGKILL\n")


def test_torchrun_with_the_flags_of_the_readme_lets_its_ranks_save(tmp_path: Path) -> None:
    """Without them USR1 kills torchrun, and the ranks die with it."""
    (flags,) = re.findall("torchrun (--shutdown-timeout .*) --nproc", (ROOT / "README.md").read_text())
    rank = tmp_path / "rank.py"
    rank.write_text(
        "import sys, time\nfrom pathlib import Path\n"
        "from megatron_rlvr.processes import StopRequest, die_with_parent\n"
        "die_with_parent()\nstop = StopRequest()\nPath('ready').touch()\n"
        "while not stop.number: time.sleep(0.05)\n"
        "time.sleep(1)\nPath('saved').touch()\nsys.exit(128 + stop.number)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", f"--master-port={free_port()}", *flags.split(), rank.name]
    process = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 1
    assert (tmp_path / "saved").exists()
