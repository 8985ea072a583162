"""Settings of models that think before they answer. No numpy: `--help` must be quick."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from emlocal.errors import UsageError
from emlocal.settings.table import setting, shown
from emlocal.text import parse_json

if TYPE_CHECKING:
    from emlocal.settings.options import SamplingParams

Where = Literal["all", "thought", "answer"]
Effort = Literal["none", "minimal", "low", "medium", "high"]
_setting = partial(setting, panel="Thinking")
_MOST_VARIABLES = 32
_TAKEN = frozenset({"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"})


def _as_json(given: Any, said: str) -> str:
    """Returns an object as JSON; a text stays as it is."""
    if isinstance(given, str):
        return given
    if not isinstance(given, Mapping):
        raise UsageError(f"{said} is {shown(given)}; it must be an object")
    try:
        return json.dumps(given, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as why:
        raise UsageError(f"{said} cannot be written as JSON: {why}") from None


def _variables(text: str) -> dict[str, Any]:
    """Reads {"name": scalar}. Raises UsageError for anything else."""
    said = "chat_template_kwargs"
    try:
        given = parse_json(text)
    except ValueError as why:
        raise UsageError(f"{said} is not JSON: {why}", 'write it as {"name": true}') from None
    if not isinstance(given, dict):
        raise UsageError(f"{said} is {shown(given)}; it must be an object", 'write it as {"name": true}')
    for name, value in given.items():
        if not name.isidentifier() or name in _TAKEN:
            raise UsageError(f"{said} has the name {shown(name)}, which no template variable can have")
        if not (value is None or isinstance(value, str | bool | int | float)):
            raise UsageError(f"{said}: {name} is {shown(value)}; it must be a text, a number, true or false")
    if len(given) > _MOST_VARIABLES:
        raise UsageError(f"{said} has {len(given)} names; at most {_MOST_VARIABLES} are supported")
    return given


@dataclass(frozen=True, kw_only=True)
class ThinkingSettings:
    """How a model thinks; the defaults are the model's."""

    think: bool | None = _setting(
        None,
        "--think/--no-think --enable-thinking",
        help="Let the model think before it answers, or not. (default: as the model does)",
    )
    think_budget: int | None = _setting(
        None,
        "--think-budget --reasoning-budget --thinking-budget --thinking-token-budget",
        0,
        10**9,
        "End a thought after this many tokens.",
        unit="tokens",
    )
    reasoning_effort: Effort | None = _setting(
        None, "--reasoning-effort", help="Tell the model how much to think, if its template can."
    )
    chat_template_kwargs: str | None = _setting(
        None,
        "--chat-template-kwargs --chat-template-args",
        help="Pass further variables to the chat template.",
        metavar="JSON",
        read=_as_json,
    )
    em_where: Where = _setting("all", "--em-where", help="Take EM steps in thoughts, in answers, or in both.")

    @property
    def thinking(self) -> dict[str, Any]:
        """The settings that are not the defaults, by name, as JSON has them."""
        known = fields(ThinkingSettings)
        return {f.name: vars(self)[f.name] for f in known if vars(self)[f.name] != f.default}

    @property
    def template_variables(self) -> dict[str, Any]:
        """The variables for the chat template; templates call the switch enable_thinking or thinking.

        Raises UsageError for variables that are not scalars by name.
        """
        found: dict[str, Any] = {}
        think = False if self.think is None and self.reasoning_effort == "none" else self.think
        if think is not None:
            found |= {"enable_thinking": think, "thinking": think}
        if self.reasoning_effort not in (None, "none"):
            found["reasoning_effort"] = self.reasoning_effort
        return found | (_variables(self.chat_template_kwargs) if self.chat_template_kwargs else {})

    def by_part(self, params: "SamplingParams") -> "tuple[SamplingParams, SamplingParams | None]":
        """Returns the sampling settings of answers, and those of thoughts if they differ."""
        if params.em is None or self.em_where == "all":
            return params, None
        without = replace(params, em=None)
        return (params, without) if self.em_where == "answer" else (without, params)
