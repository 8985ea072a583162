"""Settings that change nothing together, or with this model, in words. They are allowed, and seldom meant."""

from emlocal.backends.base import ModelInfo
from emlocal.generation.thinking import form_of
from emlocal.settings import Plan


def without_effect(plan: Plan, info: ModelInfo, *, raw: bool = False, hides: bool = False) -> list[str]:
    """Returns a warning for each setting that has no effect.

    Args:
        raw: prompts go to the model without its chat template, and are not searched for thoughts.
        hides: the person asked not to see thoughts.
    """
    found = []
    params = plan.params
    greedy = params.temperature == 0 and params.dynatemp_range == 0
    if greedy and params.em is not None and params.em.keeps_most_probable:
        found.append(
            f"with --temp 0, EM ({params.em.describe()}) changes no answer: the most probable token stays"
            " the most probable (leave --temp 0 out)"
        )
    template = None if raw else info.chat_template
    if template is None or form_of(template) is None:
        found += _of_thoughts(plan, info, searched=template is not None, hides=hides)
    effort = plan.reasoning_effort
    if template is not None and effort not in (None, "none") and "reasoning_effort" not in template:
        found.append(f"the chat template of {info.name} does not read --reasoning-effort")
    return found


def _of_thoughts(plan: Plan, info: ModelInfo, *, searched: bool, hides: bool) -> list[str]:
    """Returns a warning for each thinking setting of a model or prompt without thoughts.

    `searched`: whether answers are searched for thoughts, which raw prompts' are not.
    """
    why = f"{info.name} writes no thoughts" if searched else "a raw prompt is not searched for thoughts"
    on = plan.params.em is not None and plan.em_where != "all"
    off = on and searched and plan.em_where == "thought"
    given = {
        "--think-budget": plan.think_budget is not None,
        "--hide-thinking": hides,
        f"--em-where {plan.em_where}": on and not off,
    }
    found = [f"{why}, so {flag} does nothing" for flag, is_given in given.items() if is_given]
    if off:
        found.append(f"{why}, so --em-where thought switches EM off")
    return found
