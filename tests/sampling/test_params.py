import math

import pytest

from emlocal.em.steps import EMInf
from emlocal.errors import UsageError
from emlocal.sampling import SamplingParams
from emlocal.settings import EM_PRESETS, settings_of

BAD = [
    ("repeat_penalty", (0, -1, 101), "--repeat-penalty", "more than 0 and at most 100"),
    ("presence_penalty", (-101, 101), "--presence-penalty", "between -100 and 100"),
    ("frequency_penalty", (-101, 101), "--frequency-penalty", "between -100 and 100"),
    ("repeat_last_n", (-2, 1.5), "--repeat-last-n", "between -1 and"),
    ("temperature", (-0.1, 100.5), "--temp", "between 0 and 100"),
    ("dynatemp_range", (-0.1, 101), "--dynatemp-range", "between 0 and 100"),
    ("dynatemp_exponent", (-0.1, 101), "--dynatemp-exp", "between 0 and 100"),
    ("top_k", (-1, 2.5), "--top-k", "between 0 and"),
    ("top_p", (0, -0.5, 1.01), "--top-p", "more than 0 and at most 1"),
    ("min_p", (-0.1, 1.1), "--min-p", "between 0 and 1"),
]


@pytest.mark.parametrize(("name", "values", "flag", "span"), BAD)
def test_each_bad_value_is_named_with_flag_and_range(name, values, flag, span) -> None:
    for value in (*values, math.nan, math.inf, "1", None, True):
        with pytest.raises(UsageError) as caught:
            SamplingParams(**{name: value})
        assert caught.value.message.startswith(f"{flag} is ")
        assert span in caught.value.message
        assert caught.value.exit_code == 2


def test_every_number_is_in_that_list() -> None:
    assert {name for name, *_ in BAD} == set(settings_of(SamplingParams))


def test_the_ends_of_the_ranges_are_allowed() -> None:
    SamplingParams(temperature=0, top_k=0, top_p=1, min_p=0, repeat_last_n=-1, repeat_penalty=1e-3)
    SamplingParams(temperature=100, top_k=10**9, top_p=1e-9, min_p=1, repeat_penalty=100)


@pytest.mark.parametrize("entry", [(-1, 0.0), (3, math.nan), (3, math.inf)])
def test_bad_logit_bias(entry) -> None:
    with pytest.raises(UsageError, match="--logit-bias"):
        SamplingParams(logit_bias=(entry,))


def test_without_em_changes_only_that() -> None:
    params = SamplingParams(em=EMInf(), temperature=0.3, top_k=7)
    assert params.without_em() == SamplingParams(temperature=0.3, top_k=7)


def test_presets_hold_the_published_settings() -> None:
    step, sampling = EM_PRESETS["em-pt"]
    assert (step.threshold, step.kl_weight, step.learning_rate, step.steps) == (0.3, 0.05, 0.1, 3)
    assert step.optimizer == "adam"
    assert sampling["temperature"] == 0.1
    paper, _ = EM_PRESETS["paper"]
    assert 0.1 < paper.threshold < 0.5
    assert 5 <= paper.steps <= 15
    assert (paper.optimizer, paper.kl_weight) == ("sgd", 0.0)
    for step, sampling in EM_PRESETS.values():
        SamplingParams(em=step, **sampling)
