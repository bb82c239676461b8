"""Stop signals to a command that has nothing to save."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ssmpretrain.base.whole_files import moved_into_place
from ssmpretrain.training.stopping.signals import STOPPED, stopped_at_once

ROOT = Path(__file__).parents[3]
WAITS_IN_C = """
import torch.distributed as dist
from ssmpretrain.training.stopping import signals as stop_signals
stop_signals._TO_ANSWER = 0.2
with stop_signals.stopped_at_once():
    store = dist.TCPStore("localhost", 0, is_master=True)
    print("waiting", flush=True)
    store.get("of a rank that never comes")
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_leaves_at_once_in_one_line_and_nothing_half_written(
    signum: signal.Signals, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signum)
    try:
        with pytest.raises(SystemExit) as left, stopped_at_once(), moved_into_place(tmp_path / "features.npz") as path:
            path.write_text("half")
            os.kill(os.getpid(), signum)
        assert left.value.code == STOPPED
        assert signal.getsignal(signum) == signal.SIG_IGN  # from here on the process only ends
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
        signal.signal(signum, before)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr().err == f"ssmpretrain: stopped by {signum.name}; start the same command again\n"


def test_a_second_signal_on_the_way_out_is_not_heard() -> None:
    done = []
    try:
        with pytest.raises(SystemExit), stopped_at_once():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            except SystemExit:
                os.kill(os.getpid(), signal.SIGTERM)
                done.append("tidied up")
                raise
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    assert done == ["tidied up"]


def test_handlers_are_those_of_before_after_a_command_that_was_not_stopped() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stopped_at_once():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def code_when_told_to_stop(program: str) -> int:
    """How a process ends that gets SIGTERM when it has printed its first line."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment) as waiting:
        assert waiting.stdout is not None
        waiting.stdout.readline()
        waiting.send_signal(signal.SIGTERM)
        return waiting.wait(timeout=10)


def test_a_process_that_waits_in_c_ends_too() -> None:
    assert code_when_told_to_stop(WAITS_IN_C) == STOPPED


def test_a_process_in_which_something_swallows_the_stop_ends_too() -> None:
    program = (
        "import time; from ssmpretrain.training.stopping import signals as stop_signals; stop_signals._TO_LEAVE = 0.2\n"
        "with stop_signals.stopped_at_once():\n"
        "    print('waiting', flush=True)\n"
        "    for _ in range(2):\n"
        "        try: time.sleep(60)\n"
        "        except SystemExit: pass\n"
    )
    assert code_when_told_to_stop(program) == STOPPED
