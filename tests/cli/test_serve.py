"""What `emlocal serve` says when it is ready."""

import json
import shlex
from pathlib import Path

import pytest

from emlocal import console
from emlocal.cli.serve import ServeOptions, _say_where
from emlocal.serve.guard import PublicURL


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("key", [None, Path("keys")])
def test_the_start_names_the_page_and_a_request_to_copy(
    capsys: pytest.CaptureFixture[str], host: str, key: Path | None
) -> None:
    console.err.cache_clear()
    _say_where(ServeOptions(host=host, api_key_file=key), 8077, "small")
    console.err.cache_clear()
    first, second, request = capsys.readouterr().err.splitlines()
    address = "http://127.0.0.1:8077" if host == "127.0.0.1" else "http://[::1]:8077"
    assert first == f"small answers at {address}/v1, 4 requests at a time; Ctrl-C ends it"
    assert second == f"open {address}/ in a browser for a chat, or ask from a shell:"
    words = shlex.split(request)
    assert words[:2] == ["curl", f"{address}/v1/chat/completions"]
    assert json.loads(words[-1]) == {"messages": [{"role": "user", "content": "Hi"}]}
    assert ("Authorization: Bearer KEY" in words) == (key is not None)


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    console.err.cache_clear()
    _say_where(ServeOptions(quiet=True), 8077, "small")
    assert capsys.readouterr().err == ""


def test_the_start_names_the_proxy_s_address(capsys: pytest.CaptureFixture[str]) -> None:
    console.err.cache_clear()
    _say_where(ServeOptions(), 8077, "small", PublicURL.read("https://em.example.org"))
    console.err.cache_clear()
    said = " ".join(capsys.readouterr().err.split())
    assert "open https://em.example.org/ in a browser" in said
    assert "pass requests on to http://127.0.0.1:8077" in said
