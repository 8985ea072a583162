"""The conversation's file format."""

import json
from pathlib import Path

import pytest

from emlocal.chat.conversation import Conversation
from emlocal.errors import EmlocalError, UsageError


def test_messages_hold_everything_in_order() -> None:
    said = Conversation("be brief", [("a", "b")])
    assert [(m["role"], m["content"]) for m in said.messages("c")] == [
        ("system", "be brief"),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
    ]
    assert [m["role"] for m in Conversation().messages("c")] == ["user"]


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    said = Conversation("sei höflich", [("Wie geht’s? 🙂", "gut\n\tja"), ("", "\x00")])
    path = tmp_path / "chat.json"
    said.save(path, "a model")
    assert Conversation.load(path) == said
    assert json.loads(path.read_text())["model"] == "a model"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[1]",
        b'{"format": "other"}',
        b"\xff\xfe",
        b'{"format": "emlocal-chat-1", "exchanges": [{"question": 1, "answer": "x"}]}',
        b'{"format": "emlocal-chat-1", "exchanges": "ab"}',
        b'{"format": "emlocal-chat-1", "system": 3, "exchanges": []}',
        b"[" * 100_000,
    ],
)
def test_what_is_no_conversation_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "chat.json"
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        Conversation.load(path)
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message


def test_missing_files_and_folders_that_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        Conversation.load(tmp_path / "none.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(EmlocalError, match="cannot write"):
        Conversation().save(tmp_path / "file" / "chat.json", "m")
