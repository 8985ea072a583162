"""`emlocal generate` on a tiny model in real llama.cpp."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Outcome

Emlocal = Callable[..., Outcome]
SHORT = ("--max-tokens", "12", "--seed", "7")


def test_the_same_seed_gives_the_same_answer_and_stdout_nothing_else(emlocal: Emlocal, tiny: str) -> None:
    first = emlocal("generate", "-m", tiny, "--em-inf", *SHORT, "hello")
    again = emlocal("generate", "-m", tiny, "--em-inf", *SHORT, "hello")
    plain = emlocal("generate", "-m", tiny, *SHORT, "hello")
    other = emlocal("generate", "-m", tiny, "--max-tokens", "12", "--seed", "8", "hello")
    assert first.code == 0
    assert first.out == again.out
    assert plain.out != other.out
    assert "tiny.gguf" in first.err
    assert "cut off at --max-tokens 12" in first.err
    assert "seed 7" in first.err


def test_quiet_leaves_stderr_empty_unless_an_answer_is_cut_off(emlocal: Emlocal, tiny: str) -> None:
    common = ("generate", "-m", tiny, "-q", *SHORT)
    assert emlocal(*common, "--regex", "the", "hello").err == ""
    assert emlocal(*common, "hello").err == "warning: the answer is cut off at --max-tokens 12\n"
    several = emlocal(*common, "-n", "3", "hello")
    assert several.err == "warning: 3 of 3 answers: cut off at --max-tokens 12\n"
    assert several.code == 0


def test_settings_that_do_nothing_are_said(emlocal: Emlocal, tiny: str) -> None:
    flags = ("--em-inf", "--temp", "0", "--think-budget", "9", "--hide-thinking")
    for verb in (("generate", "hello"), ("chat",)):
        said = emlocal(*verb, "-m", tiny, *flags, *SHORT, stdin="" if "hello" in verb else "hi\n").err
        assert said.count("warning: with --temp 0, EM (δ 0.3") == 1
        assert said.count("tiny.gguf writes no thoughts, so --think-budget does nothing") == 1
        assert said.count("tiny.gguf writes no thoughts, so --hide-thinking does nothing") == 1
    assert "warning" not in emlocal("generate", "-m", tiny, "--em-inf", *SHORT, "hello").err


def test_json_is_one_object_with_everything(emlocal: Emlocal, tiny: str) -> None:
    done = emlocal("generate", "-m", tiny, "--em-inf", "--json", *SHORT, "hello")
    value = json.loads(done.out)
    assert done.err == ""
    assert value["finish_reason"] == "length"
    assert value["completion_tokens"] == 12
    assert value["prompt_tokens"] > 5
    assert value["seed"] == 7
    assert value["entropy"]["mean_after"] < value["entropy"]["mean_before"]
    assert 0 < value["entropy"]["touched"] <= 1
    assert value["timings"]["generation_seconds"] > 0
    plain = emlocal("generate", "-m", tiny, "--em-inf", "-q", *SHORT, "hello").out
    assert value["text"] + "\n" == plain


def test_a_random_seed_is_shown_and_repeats_the_answer(emlocal: Emlocal, tiny: str) -> None:
    first = json.loads(emlocal("generate", "-m", tiny, "--json", "--max-tokens", "8", "x").out)
    again = emlocal("generate", "-m", tiny, "--json", "--max-tokens", "8", "--seed", str(first["seed"]), "x")
    assert json.loads(again.out)["text"] == first["text"]


def test_samples_differ_and_the_first_is_what_one_sample_gives(emlocal: Emlocal, tiny: str) -> None:
    many = json.loads(emlocal("generate", "-m", tiny, "--json", "-n", "3", *SHORT, "hello").out)
    texts = [c["text"] for c in many["completions"]]
    one = json.loads(emlocal("generate", "-m", tiny, "--json", *SHORT, "hello").out)
    assert len(set(texts)) == 3
    assert texts[0] == one["text"]
    plain = emlocal("generate", "-m", tiny, "-n", "3", "-q", *SHORT, "hello").out
    assert plain.count("\n---\n") == 2


def test_a_vote_prints_the_answer_alone_and_says_who_agrees(emlocal: Emlocal, tiny: str) -> None:
    vote = (
        "generate",
        "-m",
        tiny,
        "--method",
        "vote:3",
        "--wave",
        "2",
        "--logit-bias",
        "40=20",
        "--stop",
        "A",
    )
    vote = (*vote, "--extract", "none", *SHORT, "hello")
    value = json.loads(emlocal(*vote, "--json").out)
    assert value["drawn"] == len(value["samples"])
    assert value["stopped"] in ("decided", "sure", "budget")
    assert 0 <= value["agreement"] <= 1
    assert value["text"] in [sample["text"] for sample in value["samples"]]
    plain = emlocal(*vote)
    assert plain.out == value["text"].strip("\n") + "\n"
    if value["answer"]:
        assert f"{value['votes']} of {value['drawn']} agree" in plain.err
    else:
        assert f"none of {value['drawn']} has an answer to vote on" in plain.err
    assert "semantic_entropy" not in plain.err  # words, not a dump of fields
    assert "agree" not in emlocal(*vote, "-q").err
    greedy = emlocal("generate", "-m", tiny, "--method", "greedy", *vote[7:11], *SHORT, "-q", "hello").out
    assert value["samples"][0]["text"].strip("\n") + "\n" == greedy


def test_em_best_prints_one_of_its_texts(emlocal: Emlocal, tiny: str) -> None:
    done = emlocal("generate", "-m", tiny, "--method", "em-best:3", "--score", "unsure", *SHORT, "hello")
    value = json.loads(
        emlocal("generate", "-m", tiny, "--method", "em-best:3:score=unsure", "--json", *SHORT, "hello").out
    )
    assert done.out == value["text"].strip("\n") + "\n"
    assert "the most certain of 3 by unsure" in done.err
    assert len(value["samples"]) == value["drawn"] == 3


def test_prompt_from_argument_file_and_stdin_together(emlocal: Emlocal, tiny: str, tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("from the file\n")
    common = ("generate", "-m", tiny, "--json", "--temp", "0", "--max-tokens", "2")
    together = emlocal(*common, "-f", str(file), "argument", stdin="stdin\n")
    spelled = emlocal(*common, "stdin\n\nfrom the file\n\nargument")
    assert json.loads(together.out)["prompt_tokens"] == json.loads(spelled.out)["prompt_tokens"]
    assert emlocal(*common, "-f", "-", stdin="hello").code == 0
    assert emlocal(*common, stdin="\ufeffhello").code == 0


def test_raw_goes_without_template(emlocal: Emlocal, tiny: str) -> None:
    templated = json.loads(emlocal("generate", "-m", tiny, "--json", *SHORT, "hello").out)
    raw = json.loads(emlocal("generate", "-m", tiny, "--json", "--raw", *SHORT, "hello").out)
    assert raw["prompt_tokens"] < templated["prompt_tokens"]
    system = json.loads(emlocal("generate", "-m", tiny, "--json", "--system", "be kind", *SHORT, "hello").out)
    assert system["prompt_tokens"] > templated["prompt_tokens"]


def test_trace_has_a_line_per_token(emlocal: Emlocal, tiny: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    done = emlocal("generate", "-m", tiny, "--em-inf", "--trace", str(path), "--json", *SHORT, "hello")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(12))
    mean = sum(line["entropy_before"] for line in lines) / 12
    assert json.loads(done.out)["entropy"]["mean_before"] == pytest.approx(mean, abs=1e-5)
    assert all(line["p_before"] > 0 for line in lines)
    assert [p.name for p in tmp_path.iterdir() if "trace" in p.name] == ["trace.jsonl"]


def test_think_em_with_json_and_trace(emlocal: Emlocal, tiny: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    how = ("--method", "think-em:3:think-steps=2", "--max-tokens", "60", "--seed", "7")
    done = json.loads(emlocal("generate", "-m", tiny, "--json", "--trace", str(path), *how, "hello").out)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    ended = done["finish_reason"] == "stop"
    # tokens of the answer, not of all that was considered
    assert len(lines) == done["completion_tokens"] + ended
    assert done["steps"] in (1, 2)
    assert done["timings"]["generated_tokens"] >= done["considered_tokens"] > len(lines) / 2
    shown = emlocal("generate", "-m", tiny, *how, "hello")
    assert f"steps {done['steps']} · changed_steps {done['changed_steps']}" in shown.err


def test_show_entropy_without_terminal_is_plain_and_says_so(emlocal: Emlocal, tiny: str) -> None:
    plain = emlocal("generate", "-m", tiny, *SHORT, "hello")
    shown = emlocal("generate", "-m", tiny, "--show-entropy", *SHORT, "hello")
    assert shown.out == plain.out
    assert "has no colours" in shown.err


def test_stop_strings(emlocal: Emlocal, tiny: str) -> None:
    text = json.loads(emlocal("generate", "-m", tiny, "--json", *SHORT, "hello").out)["text"]
    stop = text[4:6]
    done = json.loads(emlocal("generate", "-m", tiny, "--json", "--stop", stop, *SHORT, "hello").out)
    assert done["text"] == text[: text.index(stop)]
    assert (done["finish_reason"], done["stop"]) == ("stop", stop)


def test_logit_bias_bans_a_token(emlocal: Emlocal, tiny: str, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    emlocal("generate", "-m", tiny, "--temp", "0", "--trace", str(path), *SHORT, "hello")
    first = json.loads(path.read_text().splitlines()[0])["token"]
    emlocal(
        "generate",
        "-m",
        tiny,
        "--temp",
        "0",
        "--logit-bias",
        f"{first}=-inf",
        "--trace",
        str(path),
        *SHORT,
        "hello",
    )
    assert first not in [json.loads(line)["token"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "the prompt is empty"),
        (["  \n"], "the prompt is empty"),
        (["x", "--temp", "-1"], "--temp is -1; it must be between 0 and 100"),
        (["x", "--top-p", "0"], "--top-p is 0; it must be more than 0 and at most 1"),
        (["x", "--min-p", "2"], "--min-p is 2"),
        (["x", "--em-inf", "--em-threshold", "-0.1"], "--em-threshold is -0.1; it must be at least 0"),
        (["x", "--em-inf", "--em-learning-rate", "0"], "--em-learning-rate is 0"),
        (["x", "--em-steps", "3"], "--em-steps has no effect without --em-inf"),
        (["x", "--em-inf", "--em-ratio", "0.5"], "--em-ratio has no effect without --adaptive-temp"),
        (["x", "--em-inf", "--adaptive-temp"], "contradict each other"),
        (["x", "--no-em-inf", "--em-preset", "paper"], "contradict each other"),
        (["x", "--adaptive-temp", "--em-steps", "2"], "--em-steps has no effect without --em-inf"),
        (["x", "--json", "--show-entropy"], "contradict each other"),
        (["x", "-n", "0"], "--samples is 0"),
        (["x", "--max-tokens", "0"], "--max-tokens is 0"),
        (["x", "--stop", ""], '--stop is [""]; it must be a text or a list of texts that are not empty'),
        (["x", "--seed", "-1"], "--seed is -1"),
        (["x", "--logit-bias", "cat"], "--logit-bias is 'cat'"),
        (["x", "-f", "/no/such/file"], "cannot read /no/such/file"),
        (["x", "-f", "/"], "cannot read /"),
        (["x", "--context", "3"], "--context is 3"),
        (["x", "--threads", "0"], "--threads is 0"),
        (["x", "--context", "100000"], "exceeds the"),
        (["x", "--adapter", "/no/adapter.gguf"], "there is no adapter"),
        (["x", "--logit-bias", "99999=1"], "names token 99999"),
        (["x", "--raw", "--system", "y"], "contradict each other"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(
    emlocal: Emlocal, tiny: str, arguments: list[str], says: str
) -> None:
    done = emlocal("generate", "-m", tiny, *arguments)
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert says in errors[0]
    assert done.code == 2
    assert done.out == ""
    assert "Traceback" not in done.err


def test_stdin_that_is_not_utf8(emlocal: Emlocal, tiny: str) -> None:
    done = emlocal("generate", "-m", tiny, stdin=b"caf\xe9")
    assert "byte 0xe9 at offset 3" in done.err
    assert done.code == 2


def test_a_prompt_longer_than_the_context_names_both_numbers(emlocal: Emlocal, tiny: str) -> None:
    done = emlocal("generate", "-m", tiny, "--context", "32", "etaoin " * 30)
    assert done.code == 1
    assert "the context holds 32" in done.err
    assert "tokens" in done.err


def test_a_full_context_ends_the_answer_and_says_so(emlocal: Emlocal, tiny: str) -> None:
    done = emlocal("generate", "-m", tiny, "--context", "48", "--logit-bias", "2=-inf", "hi")
    assert done.code == 0
    assert "context of" in done.err or "finished" in done.err


@pytest.mark.parametrize("content", [b"", b"GGUF", b"hello" * 100])
def test_files_that_are_no_model(emlocal: Emlocal, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    done = emlocal("generate", "-m", str(path), "x")
    assert done.code == 1
    assert "bad.gguf" in done.err
    assert "Traceback" not in done.err


def test_a_truncated_model(emlocal: Emlocal, tiny: str, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(Path(tiny).read_bytes()[:-1000])
    done = emlocal("generate", "-m", str(path), "x")
    assert done.code == 1
    assert "cut.gguf" in done.err


def test_an_unknown_model_suggests(emlocal: Emlocal) -> None:
    done = emlocal("generate", "-m", "smolm2:135m", "x")
    assert done.code != 0
    assert "smollm2:135m" in done.err


def test_trace_into_a_folder_that_is_not_there(emlocal: Emlocal, tiny: str) -> None:
    done = emlocal("generate", "-m", tiny, "--trace", "/no/such/folder/t.jsonl", *SHORT, "x")
    assert done.code == 1
    assert "cannot write /no/such/folder/t.jsonl" in done.err


def test_ctrl_c_while_the_model_is_loaded(
    emlocal: Emlocal, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emlocal.loading._prepare", lambda header: signal.raise_signal(signal.SIGINT))
    outcome = emlocal("generate", "-m", tiny, "Hello")
    assert (outcome.code, outcome.out) == (130, "")
