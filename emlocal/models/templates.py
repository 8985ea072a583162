"""Chat templates: a model's own Jinja program that turns messages into its prompt.

A template comes out of a downloaded file, so it is treated as hostile: it is rendered in a process of its own
with bounds on time, output and memory, which stays from turn to turn (template_process.py). Templates that
are known by their digest (known_templates.toml) are rendered here: somebody has read them, and they end.
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from emlocal.errors import ModelError, UsageError
from emlocal.models.template_process import TemplateProcess
from emlocal.models.template_worker import prepared, rendered

Message = Mapping[str, str]
_RAW = "use --raw to go without it"
_process = TemplateProcess()


def is_known(template: str) -> bool:
    """Whether this is, but for a newline at its end, a template that has been read."""
    return digest(template) in _known()


@lru_cache(maxsize=4)
def digest(template: str) -> str:
    """The name of a template in known_templates.toml. Jinja drops one newline at the end itself."""
    text = template.removesuffix("\n").encode(errors="surrogatepass")
    return hashlib.blake2b(text, digest_size=16).hexdigest()


@cache
def _known() -> frozenset[str]:
    import tomllib

    with Path(__file__).with_name("known_templates.toml").open("rb") as file:
        return frozenset(entry["digest"] for entry in tomllib.load(file)["template"])


def start_process(template: str | None) -> None:
    """Start what a stranger's template needs, as early as it is known: it takes a while. Raises nothing."""
    if template is not None and not is_known(template):
        _process.prepare(template)


def prepare(template: str | None) -> None:
    """Compile a known template before it is needed. Raises nothing."""
    if template is not None and is_known(template):
        prepared(template)


def render(
    template: str, messages: Sequence[Message], *, bos: str = "", eos: str = "", **variables: Any
) -> str:
    """The prompt for these messages, ending where the assistant is to speak.

    Args:
        template: the Jinja text of `tokenizer.chat_template`.
        messages: {"role": "system" | "user" | "assistant", "content": text}.
        variables: what else the template may look at (`enable_thinking=False`, say); values that JSON has.
    Raises:
        UsageError: the template refuses these messages (a system message where it knows none, say).
        ModelError: the template is broken, or exceeds the bounds.
        EmlocalError: the template's process cannot be started.
        CancelledError: Ctrl-C or SIGTERM asked a block of `interruptible` to stop.
    """
    values = {"bos_token": bos, "eos_token": eos, "add_generation_prompt": True, **variables}
    said = [dict(message) for message in messages]
    if is_known(template):
        kind, text = rendered(template, said, values)
    else:
        kind, text = _process.ask({"template": template, "messages": said, "values": values})
    if kind == "text":
        return text
    if kind == "refused":
        raise UsageError(f"the model's chat template refuses this conversation: {text}")
    if kind == "stopped":
        raise ModelError(f"the model's chat template was stopped: {text}", _RAW)
    raise ModelError(f"the model's chat template fails: {text}", _RAW)
