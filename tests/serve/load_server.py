"""A server on the engine without a model, as a process. SIGTERM ends it.

Its first line on stdout is the port. For each line on stdin it writes what it holds, when no request is left.
"""

import asyncio
import gc
import json
import resource
import sys
import threading
import time
from pathlib import Path

from tests.serve.servers import Running, endless, running


def held(server: Running) -> dict[str, int]:
    """What this process has, after the last request."""
    server.wait(server.idle, 30)
    time.sleep(0.1)  # connections close
    gc.collect()
    objects = gc.get_objects()
    return {
        "objects": len(objects),
        "bytes": int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize(),
        "tasks": sum(isinstance(each, asyncio.Task) and not each.done() for each in objects),
        "connections": sum(isinstance(each, asyncio.Transport) for each in objects),
        "files": sum(1 for _ in Path("/proc/self/fd").iterdir()),
        "threads": threading.active_count(),
        "sequences": len(server.backend._held),
        "cancelled": server.server.metrics.cancelled,
    }


def main() -> None:
    seconds = float(sys.argv[1])
    with running(endless, parallel=8, queue=200, context=4096, seconds=seconds) as server:

        def tell() -> None:
            for _ in sys.stdin:
                print(json.dumps(held(server)), flush=True)

        with server.server.ended_by_signals():
            print(server.port, flush=True)
            threading.Thread(target=tell, daemon=True).start()
            server.engine.join()


if __name__ == "__main__":
    main()
