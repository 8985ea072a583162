"""Several rows of a sequence in one pass, on all engines that go back from guessed tokens."""

import pytest

from emlocal.backends.base import Feed, Row
from emlocal.sampling import SamplingParams
from tests.backends.contract import assert_same_logits, read, tokens

GREEDY = SamplingParams(temperature=0)


@pytest.fixture
def backend(loaded):
    yield loaded
    for sequence in range(loaded.max_sequences):
        try:
            loaded.release(sequence)
        except KeyError:  # it was not open
            continue


class TestRows:
    def test_engines_say_whether_they_go_back(self, backend) -> None:
        assert backend.rewinds == (backend.name in ("fake", "llama.cpp"))  # the test models can all be cut

    def test_each_row_is_the_one_of_its_token(self, backend) -> None:
        if not backend.rewinds:
            return
        ids = tokens(backend)
        sequence, other = read(backend, ids[:4]), read(backend, ids[:2])
        backend.forward([Feed(sequence, ids[4:8], wanted=3), Feed(other, ids[2:3])])
        rows = [backend.logits(sequence, back) for back in range(3)]
        drawn = backend.sample([Row(sequence, GREEDY, 0.5, back=back) for back in range(3)])
        assert [draw.token for draw in drawn] == [row.argmax() for row in rows]
        beside = backend.logits(other)
        with pytest.raises(KeyError):
            backend.logits(sequence, 3)
        with pytest.raises(KeyError):
            backend.logits(other, 1)
        backend.release(sequence)
        backend.release(other)
        for back, row in enumerate(rows):
            alone = read(backend, ids[: 8 - back])
            assert_same_logits(backend, row, backend.logits(alone))
            backend.release(alone)
        assert_same_logits(backend, beside, backend.logits(read(backend, ids[:3])))

    def test_wrong_guesses_leave_no_trace(self, backend) -> None:
        if not backend.rewinds:
            return
        ids = tokens(backend)
        sequence = read(backend, ids[:4])
        backend.forward([Feed(sequence, [ids[4], 7, 8, 9], wanted=4)])
        assert backend.trim(sequence, 5) == 5
        backend.forward([Feed(sequence, ids[5:7])])
        row = backend.logits(sequence)
        backend.release(sequence)
        assert_same_logits(backend, row, backend.logits(read(backend, ids[:7])))

    def test_more_rows_than_tokens_are_refused(self, backend) -> None:
        sequence = backend.open()
        with pytest.raises(ValueError, match="2 rows are wanted of a feed of 1"):
            backend.forward([Feed(sequence, [5], wanted=2)])
