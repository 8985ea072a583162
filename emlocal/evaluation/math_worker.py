"""The process that `MathJudge` asks: a line [gold, answer] in, true or false out.

Its argument is how many seconds an answer may take. MathJudge ends it before; where MathJudge was killed, the
system's alarm does.
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
    """End this process in so many seconds; 0: do not. Without a handler: sympy's long divisions hear none."""
    if sys.platform != "win32":
        signal.alarm(seconds)


def main() -> None:
    """Answer until stdin ends."""
    _limit_memory()
    from math_verify import parse, verify

    print("ready", flush=True)
    for line in sys.stdin:
        _alarm(int(sys.argv[1]))
        gold, answer = (parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in json.loads(line))
        # no timeouts of its own: they are signals, which sympy's long divisions do not hear
        print(json.dumps(bool(verify(gold, answer, timeout_seconds=None))), flush=True)
        _alarm(0)


if __name__ == "__main__":
    main()
