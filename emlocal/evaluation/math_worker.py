"""The worker process of `MathJudge`: reads lines [gold, answer], writes true or false.

Its argument is the time limit of an answer in seconds. MathJudge ends the process before that; if MathJudge
was killed, the system's alarm does.
"""

import json
import signal
import sys

_MEMORY = 4 << 30  # bytes of address space


def _limit_memory() -> None:
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))


def _alarm(seconds: int) -> None:
    """Ends this process in so many seconds; 0 cancels the alarm.

    There is no signal handler, because Python cannot run one during sympy's long divisions.
    """
    if sys.platform != "win32":
        signal.alarm(seconds)


def main() -> None:
    """Answers until stdin ends."""
    _limit_memory()
    from math_verify import parse, verify

    print("ready", flush=True)
    for line in sys.stdin:
        _alarm(int(sys.argv[1]))
        gold, answer = (parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in json.loads(line))
        # math-verify's own timeouts are signals, whose handlers cannot run during sympy's long divisions
        print(json.dumps(bool(verify(gold, answer, timeout_seconds=None))), flush=True)
        _alarm(0)


if __name__ == "__main__":
    main()
