import os
import signal
import subprocess
import sys
import threading
from types import FrameType

import pytest

from emlocal.generation import Cancellation, interruptible


def test_the_first_interrupt_sets_the_flag_and_the_second_raises() -> None:
    before = signal.getsignal(signal.SIGINT)
    with interruptible() as cancelled:
        assert not cancelled()
        os.kill(os.getpid(), signal.SIGINT)
        assert cancelled()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_handler_is_put_back_after_an_error() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(RuntimeError), interruptible():
        raise RuntimeError
    assert signal.getsignal(signal.SIGINT) is before


def test_blocks_within_blocks() -> None:
    with interruptible() as outer:
        with interruptible() as inner:
            os.kill(os.getpid(), signal.SIGINT)
        assert inner()
        assert not outer()
        os.kill(os.getpid(), signal.SIGINT)
        assert outer()


def test_in_another_thread_nothing_is_caught() -> None:
    found: list[Cancellation] = []

    def work() -> None:
        with interruptible() as cancelled:
            found.append(cancelled)

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not found[0]()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_real_ctrl_c_ends_an_answer_and_not_the_program() -> None:
    code = """
import time
from emlocal.backends.fake import FakeBackend, hashed
from emlocal.generation import *
from emlocal.sampling import *
def slow(tokens):
    time.sleep(0.01)
    return hashed(tokens)
runner = Scheduler(FakeBackend(slow, context=10**6), 1)
with interruptible() as cancelled:
    params = SamplingParams(temperature=1.0, logit_bias=((256, float("-inf")),))
    for event in runner.follow([Job([1], [Request(params, Uniforms(0), 10**5)])], cancelled):
        if isinstance(event, Completed):
            print(event.completion.finish_reason, len(event.completion.tokens) > 2)
        elif isinstance(event, Token) and event.handle.timings.generated_tokens == 3:
            print("running", flush=True)
print("alive")
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=30)
    assert rest == "cancelled True\nalive\n"
    assert process.returncode == 0


def test_termination_sets_the_flag_and_is_handed_on_at_the_end() -> None:
    seen: list[str] = []

    def outermost(number: int, frame: FrameType | None) -> None:
        seen.append("outermost")

    before = signal.signal(signal.SIGTERM, outermost)
    try:
        with interruptible() as outer:
            with interruptible() as inner:
                os.kill(os.getpid(), signal.SIGTERM)
                assert inner()
                assert not outer()
            assert outer()
            assert seen == []
        assert seen == ["outermost"]
        with interruptible():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            assert seen == ["outermost"] * 2  # at once: the user is in a hurry
        assert seen == ["outermost"] * 2
        assert signal.getsignal(signal.SIGTERM) is outermost
    finally:
        signal.signal(signal.SIGTERM, before)


def test_termination_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with interruptible() as cancelled:
            os.kill(os.getpid(), signal.SIGTERM)
            assert not cancelled()
    finally:
        signal.signal(signal.SIGTERM, before)
