"""Ordinary programs: the sandbox lets them work, and gives the reason if it does not."""

import subprocess
import sys

import pytest

from emlocal.sandbox import landlock, run, seccomp
from emlocal.sandbox.run import Limits

pytestmark = pytest.mark.skipif(
    landlock.abi() < landlock.OLDEST_ABI or not seccomp.known(), reason="needs Landlock (Linux 6.2)"
)

ORDINARY = {
    "dataclasses and enums": """
from dataclasses import dataclass, field, replace
from enum import Enum, auto
class Colour(Enum):
    RED = auto()
@dataclass(frozen=True, order=True)
class P:
    x: int
    y: list = field(default_factory=list, compare=False)
assert replace(P(1), x=2) > P(1) and Colour.RED.value == 1
""",
    "texts": """
import re, string, textwrap, difflib, unicodedata, html, csv, io
assert re.sub(r'(\\w+) (\\w+)', r'\\2 \\1', 'a b') == 'b a'
assert unicodedata.normalize('NFC', 'e\\u0301') == '\\xe9'
assert list(csv.reader(io.StringIO('a,b'))) == [['a', 'b']]
assert textwrap.wrap('a b', 1) == ['a', 'b'] and difflib.get_close_matches('ab', ['abc'])
""",
    "data": """
import json, pickle, copy, base64, hashlib, zlib, bz2, lzma, struct, array, xml.etree.ElementTree as E
value = {'a': [1, 2.5, None, 'x']}
assert json.loads(json.dumps(value)) == pickle.loads(pickle.dumps(value)) == copy.deepcopy(value)
assert hashlib.sha256(b'').hexdigest()[:4] == 'e3b0' and base64.b64decode(base64.b64encode(b'x')) == b'x'
assert all(m.decompress(m.compress(b'x' * 99)) == b'x' * 99 for m in (zlib, bz2, lzma))
assert E.fromstring('<a b="1"/>').get('b') == '1' and struct.unpack('<I', b'\\x01\\0\\0\\0') == (1,)
""",
    "dates": """
import calendar, datetime, time
from zoneinfo import ZoneInfo
day = datetime.datetime(2024, 2, 29, 12, tzinfo=ZoneInfo('UTC'))
assert (day + datetime.timedelta(days=1)).isoformat() == '2024-03-01T12:00:00+00:00'
assert calendar.monthrange(2024, 2) == (3, 29) and datetime.date.fromisoformat('2003-02-01').year == 2003
assert datetime.datetime.strptime('1/2/03', '%d/%m/%y').month == 2
assert datetime.datetime.now().year > 2000 and time.localtime().tm_year > 2000
""",
    "numbers": """
import cmath, decimal, fractions, math, random, secrets, statistics
assert decimal.Decimal('0.1') + decimal.Decimal('0.2') == decimal.Decimal('0.3')
assert fractions.Fraction(1, 3) * 3 == 1 and math.isqrt(17) == 4 and statistics.median([1, 3, 2]) == 2
random.seed(7)
assert sorted(random.sample(range(9), 9)) == list(range(9)) and 0 <= secrets.randbelow(5) < 5
assert 2 ** 3000 % 1_000_007 == pow(2, 3000, 1_000_007) and abs(cmath.exp(1j * math.pi) + 1) < 1e-9
""",
    "collections": """
import bisect, collections, functools, heapq, itertools, operator
assert collections.Counter('aab').most_common(1) == [('a', 2)]
heap = [3, 1, 2]
heapq.heapify(heap)
assert heapq.heappop(heap) == 1 and bisect.bisect([1, 2, 3], 2) == 2
assert len(list(itertools.permutations(range(5)))) == 120
assert functools.reduce(operator.mul, range(1, 6)) == 120 and collections.deque([1, 2], 1)[0] == 2
@functools.lru_cache(None)
def fib(n):
    return n if n < 2 else fib(n - 1) + fib(n - 2)
assert fib(200) > 10 ** 40
""",
    "classes": """
import abc, contextlib, inspect, typing, weakref, types
T = typing.TypeVar('T')
class Stack(typing.Generic[T]):
    def __init__(self): self.items = []
    def __enter__(self): return self
    def __exit__(self, *_): self.items.clear()
class Shape(abc.ABC):
    @abc.abstractmethod
    def area(self): ...
with contextlib.suppress(TypeError):
    Shape()
    raise AssertionError
with Stack() as stack:
    alive = weakref.ref(stack)
assert alive() is stack and inspect.signature(Shape.area).parameters
""",
    "output and input": """
import contextlib, io, logging, os, sys, pprint
out = io.StringIO()
with contextlib.redirect_stdout(out):
    print('x', end='')
assert out.getvalue() == 'x' and sys.stdin.read() == ''
with open(os.devnull, 'w') as nowhere:
    print('x', file=nowhere)
logging.warning('x')
pprint.pprint({1: 2})
print('x' * 100_000)
""",
    "time and alarms": """
import signal, time, timeit
time.sleep(0.01)
assert time.perf_counter() > 0 and time.process_time() > 0 and time.monotonic_ns() > 0
assert timeit.timeit('1 + 1', number=100) > 0
def late(*_): raise TimeoutError
signal.signal(signal.SIGALRM, late)
signal.setitimer(signal.ITIMER_REAL, 0.05)
try:
    time.sleep(5)
    raise AssertionError
except TimeoutError:
    pass
""",
    "locks without threads": """
import queue, threading
lock, event, boxes = threading.RLock(), threading.Event(), queue.PriorityQueue()
with lock:
    boxes.put(2)
    boxes.put(1)
assert boxes.get() == 1 and not event.wait(0.01) and not threading.Semaphore(0).acquire(timeout=0.01)
assert threading.current_thread().name == 'MainThread' and threading.local()
""",
    "what it runs on": """
import getpass, locale, os, pathlib, platform, resource, select, shutil, sys, uuid
assert os.cpu_count() and os.getpid() and platform.system() == 'Linux' and platform.platform()
assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss and len(os.urandom(8)) == 8 and uuid.uuid4()
assert pathlib.Path('/usr/lib').exists() and not pathlib.Path('/nothing').exists() and os.getcwd() == '/'
assert pathlib.Path('a/../b').resolve() == pathlib.Path('/b') and not sys.stdout.isatty()
assert shutil.get_terminal_size() and locale.getlocale() and os.environ['PATH']
reading, writing = os.pipe()
os.set_blocking(reading, False)
os.write(writing, b'x')
poll = select.poll()
poll.register(reading, select.POLLIN)
assert poll.poll(1000) and select.select([reading], [], [], 1)[0] and os.read(reading, 9) == b'x'
""",
    "a database in memory": """
import sqlite3
with sqlite3.connect(':memory:') as base:
    base.execute('create table t (x)')
    base.executemany('insert into t values (?)', [(i,) for i in range(99)])
    assert base.execute('select sum(x) from t').fetchone() == (4851,)
""",
    "tests and source": """
import ast, dis, doctest, io, tokenize, traceback, unittest
class T(unittest.TestCase):
    def test(self): self.assertEqual(1, 1)
done = unittest.TextTestRunner(io.StringIO()).run(unittest.defaultTestLoader.loadTestsFromTestCase(T))
assert done.wasSuccessful() and ast.unparse(ast.parse('x=1')) == 'x = 1' and dis.Bytecode('x')
try:
    1 / 0
except ZeroDivisionError:
    assert 'division' in traceback.format_exc()
assert eval('1 + 1') == 2 and compile('x', '', 'eval')
""",
    "much memory, and giving it back": """
import ctypes, gc, mmap
x = bytearray(300 << 20)
x[::4096] = b'x' * len(x[::4096])
del x
gc.collect()
m = mmap.mmap(-1, 1 << 20)
m[:3] = b'abc'
m.resize(1 << 21)
assert m[:3] == b'abc' and ctypes.CDLL(None).strlen(b'abc') == 3
assert sum(len(str(i)) for i in range(300_000)) == 1_688_890
""",
    "numpy": """
import numpy as np
rng = np.random.default_rng(1)
a = rng.normal(size=(200, 200))
assert np.allclose(np.linalg.solve(a, a @ np.ones(200)), 1) and np.linalg.svd(a)[1].min() > 0
assert np.allclose(np.fft.ifft(np.fft.fft(a)).real, a) and np.einsum('ij,ij->', a, a) > 0
assert np.datetime64('2024-01-01') < np.datetime64('now') and np.polyfit([0, 1], [0, 1], 1)[0] > 0.9
np.random.seed(0)
assert np.sort(np.random.rand(100_000)).shape == (100_000,) and str(np.arange(3)) == '[0 1 2]'
""",
    "scipy": """
import numpy as np, scipy
from scipy import fft, integrate, interpolate, linalg, ndimage, optimize
from scipy import signal, sparse, spatial, special, stats
from scipy.sparse.linalg import eigsh, spsolve
assert abs(integrate.quad(np.sin, 0, np.pi)[0] - 2) < 1e-9 and optimize.brentq(lambda x: x - 1, 0, 3) == 1
assert optimize.minimize(lambda x: ((x - 1) ** 2).sum(), np.zeros(3)).success
assert spsolve(sparse.eye(9, format='csc'), np.ones(9)).sum() == 9
assert spatial.cKDTree(np.eye(3)).query(np.eye(3), workers=1)[0].sum() == 0
assert 0 < stats.norm.cdf(0) < 1 and special.gamma(5) == 24 and linalg.expm(np.zeros((2, 2)))[0, 0] == 1
""",
}


@pytest.mark.parametrize("program", ORDINARY.values(), ids=ORDINARY.keys())
def test_ordinary_programs_pass(program: str) -> None:
    assert run.run(program, Limits(seconds=30)) == run.Outcome("passed")


def test_what_can_be_imported_outside_can_be_imported_inside() -> None:
    """Tests all of the standard library but modules that open windows or pages, or print poems."""
    code = (
        "import importlib, sys\nfailed = []\n"
        "for name in sorted(sys.stdlib_module_names - {'antigravity', 'this', 'idlelib', 'turtledemo'}):\n"
        "    try:\n        importlib.import_module(name)\n"
        "    except ImportError:\n        failed.append(name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-W", "ignore", "-c", f"{code}print(failed)"],
        capture_output=True,
        text=True,
        check=True,
    )
    inside = run.run(f"{code}assert str(failed) == {done.stdout.strip()!r}, failed", Limits(seconds=30))
    assert inside == run.Outcome("passed")


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (
            "import threading\nthreading.Thread(target=int).start()",
            "RuntimeError: can't start new thread (a program",
        ),
        (
            "from concurrent.futures import ThreadPoolExecutor as Pool\nwith Pool() as p: p.submit(int)",
            "RuntimeError: can't start new thread (a program has one thread in the sandbox)",
        ),
        ("import multiprocessing\nmultiprocessing.Pool(2)", "(the sandbox refuses it)"),
        ("import subprocess\nsubprocess.run(['ls'])", "PermissionError: [Errno 1] Operation not permitted"),
        ("import asyncio\nasyncio.run(asyncio.sleep(0))", "(the sandbox refuses it)"),
        ("open('/tmp/x', 'w')", "Permission denied: '/tmp/x' (the sandbox refuses it)"),
        ("open('/nothing')", "No such file or directory: '/nothing'"),
    ],
)
def test_what_is_refused_is_said_to_be(program: str, said: str) -> None:
    outcome = run.run(program, Limits(seconds=5))
    assert outcome.ending == "failed"
    assert said in outcome.detail
    assert ("sandbox" in outcome.detail) == ("/nothing" not in program)
