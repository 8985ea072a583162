"""emlocal from Python: load a model, then generate, stream or run a batch.

    import emlocal

    with emlocal.load("smollm2:135m", parallel=8) as model:
        print(model.generate("Why is the sky blue?", em=True).text)
        for piece in model.stream("Tell me a story.", em="paper", seed=7):
            print(piece, end="")
        for row in model.batch(["2+2?", {"prompt": "3+3?", "temperature": 0}], em=True):
            print(row["text"])

Settings have the names of SamplingParams and EMInf; what is not given comes from the model's file and then
from emlocal's defaults. The config file is the command line's and is not read here.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypedDict, Unpack

from emlocal.backends.base import Backend
from emlocal.batch.lines import Row, parse_object
from emlocal.batch.run import Batch, BatchSettings
from emlocal.em.scores import Scores
from emlocal.errors import UsageError
from emlocal.generation import Completed, Completion, Scheduler, Timings, Token
from emlocal.generation.prompt import Asked, for_template, prompt_tokens, with_system
from emlocal.generation.sample import EntropySummary, summarize
from emlocal.generation.scheduler import SPARE_SEQUENCES
from emlocal.loading import load as load_shared
from emlocal.loading import load_for_batch, warn_in_python
from emlocal.methods import Chosen
from emlocal.methods.asking import Answered, Question, ask_one
from emlocal.methods.confidence import Calibration, Subject, confidence_of, read_calibration, subject_of
from emlocal.methods.scoring import scores_of
from emlocal.models.templates import Message
from emlocal.sampling import Draw, EMStep, SamplingParams
from emlocal.settings import Given, Plan, Resolved, resolve_settings
from emlocal.settings.confidence import CONFIDENCE, ConfidenceOptions
from emlocal.settings.options import BackendName, EngineOptions, KVName
from emlocal.settings.resolve import GENERATION
from emlocal.settings.table import NAMES, options_of

Method = Chosen
"""How prompts are answered: `Method("self-consistency", samples=8)`, `Method("em-inf:paper")`."""
_KEPT = 1  # sequences more, for earlier conversations: they share room
Prompt = str | Sequence[Message]
"""A question, or messages of a conversation ({"role", "content"}), the last of them the user's."""


class Settings(TypedDict, total=False):
    """What `generate`, `stream` and `batch` take by keyword: the command line's settings, and these three."""

    em: bool | str | EMStep | None
    """True: EM-INF; a preset's name; EMInf(...) or AdaptiveTemperature(...); None or False: off."""
    system: str
    raw: bool
    """The prompt goes to the model as it is, without its chat template."""
    em_inf: bool
    adaptive_temp: bool
    em_preset: str
    em_threshold: float
    em_steps: int
    em_learning_rate: float
    em_optimizer: str
    em_kl_weight: float
    em_ratio: float
    seed: int
    """Of the draws; 0 where it is not given: the same call gives the same answer."""
    max_tokens: int
    stop: str | Sequence[str]
    temperature: float
    dynatemp_range: float
    dynatemp_exponent: float
    top_k: int
    top_p: float
    min_p: float
    repeat_penalty: float
    repeat_last_n: int
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]


@dataclass(frozen=True)
class Answer:
    """What came of a prompt."""

    text: str
    finish_reason: str
    """"stop", "length" (max_tokens) or "context" (full)."""
    tokens: list[int]
    draws: list[Draw]
    """One a token: entropies, EM steps, probabilities. Nats."""
    timings: Timings
    completions: Sequence[Completion] = ()
    """All samples, where the method draws several."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """What the method says of it: of self-consistency "answer" and "votes"."""
    confidence: float | None = None
    """How sure it is, from 0 to 1 (docs/confidence.md); None: it has no tokens."""
    calibrated: bool = False
    """Whether that is the share of right answers among such answers, by a calibration of this model and
    method."""
    scores: Scores | None = None
    """How sure the model was while it wrote it, from entropies and probabilities."""

    @property
    def entropy(self) -> EntropySummary:
        """What EM did, over the answer."""
        return summarize(self.draws)


def load(
    name: str | Path | None = None,
    *,
    parallel: int = 1,
    backend: BackendName = "auto",
    context: int | None = None,
    threads: int | None = None,
    kv_type: KVName | None = None,
    adapters: Sequence[tuple[Path, float]] = (),
    offline: bool = False,
) -> "Model":
    """Load a model; None is the starter model, fetched where it is missing.

    Args:
        name: as on the command line: "smollm2:135m", a .gguf file, a model folder, "org/name:QUANT".
        parallel: how many prompts `batch` answers at once; each takes the memory of a whole context.
        context: tokens of a sequence; None: the model's own length, at most 8,192, and 2,048 in parallel.
        adapters: (LoRA adapter, scale): GGUF files, PEFT or MLX folders.
    Raises:
        ModelError: there is no such model or adapter, or it cannot be used.
        UsageError: an engine or a context that does not exist.
    """
    model = None if name is None else str(name)
    wanted = EngineOptions(model, backend, (), context, threads, kv_type, offline)
    if parallel == 1:
        return Model(load_shared(wanted, adapters, sequences=1 + SPARE_SEQUENCES + _KEPT).backend, 1)
    return Model(load_for_batch(wanted, parallel, adapters).backend, parallel)


class Model:
    """A loaded model. Not for use from two threads at once. A context manager: `close` frees its memory."""

    def __init__(self, backend: Backend, parallel: int) -> None:
        """For `load`. `backend` holds `SPARE_SEQUENCES` more sequences than `parallel`; what it can hold
        beyond them keeps earlier conversations."""
        self.backend = backend
        self.parallel = parallel
        self.runner = Scheduler(backend, parallel)
        self._open = True

    def generate(
        self,
        prompt: Prompt,
        *,
        method: Method | str | None = None,
        calibration: str | Path | None = None,
        **settings: Unpack[Settings],
    ) -> Answer:
        """Answer a prompt.

        Args:
            prompt: a question, or the messages of a conversation.
            method: as for `batch`.
            calibration: a file of `emlocal eval --calibrate`, for the confidence.
        Raises UsageError for settings out of range, ContextFullError for a prompt that does not fit.
        """
        chosen, sure = _chosen(method), _confidence_options(calibration, None)
        calibrated = None if sure.calibration is None else read_calibration(sure.calibration)
        subject = self._subject(chosen, settings, calibrated)
        for event in self._ask(prompt, chosen, settings):
            if isinstance(event, Answered):
                outcome = event.asking.result()
        done = outcome.completion
        confidence = confidence_of(outcome, subject, calibrated)
        return Answer(
            done.text,
            done.finish_reason,
            done.tokens,
            done.draws,
            outcome.timings,
            outcome.completions,
            outcome.fields,
            None if confidence is None else confidence.value,
            confidence is not None and confidence.calibrated,
            scores_of(done),
        )

    def stream(
        self, prompt: Prompt, *, method: Method | str | None = None, **settings: Unpack[Settings]
    ) -> Iterator[str]:
        """The answer's text, piece by piece as it becomes certain, in one piece where the method comes to it
        in the end. Takes and raises what `generate` does."""
        chosen = _chosen(method)
        for event in self._ask(prompt, chosen, settings):
            if isinstance(event, Answered):
                text = "" if chosen.streams else event.asking.result().completion.text
            elif chosen.streams:
                text = event.text if isinstance(event, Token) else event.completion.tail
            else:
                continue
            if text:
                yield text

    def batch(
        self,
        lines: Iterable[str | Mapping[str, Any]],
        *,
        method: Method | str | None = None,
        ordered: bool = True,
        keep: bool = False,
        calibration: str | Path | None = None,
        abstain_below: float | None = None,
        **settings: Unpack[Settings],
    ) -> Iterator[Row]:
        """Answer many prompts, `parallel` of them at once; the rows are those of `emlocal batch`.

        Args:
            lines: prompts, or objects as in a line of `emlocal batch`'s input; read as they are needed.
            method: a name such as "self-consistency:8", or with settings: `Method("min-p", samples=8)`.
            ordered: rows in the order of the lines; otherwise as they are finished.
            keep: carry a line's other fields through, under "kept".
            calibration: a file of `emlocal eval --calibrate`, for the confidence.
            abstain_below: withhold answers with less confidence: "abstained" is true, "text" None.
        A line that cannot be answered becomes a row with "error". Raises UsageError for bad settings.
        """
        self._check_open()
        if isinstance(lines, str):
            raise UsageError("lines is one text; a batch takes a list of them")
        chosen, resolved = _chosen(method), self._resolved(settings)
        sure = _confidence_options(calibration, abstain_below)
        calibrated = None if sure.calibration is None else read_calibration(sure.calibration)
        self._subject(chosen, settings, calibrated)
        shared = BatchSettings(
            chosen.plan(resolved.plan, resolved.chosen),
            chosen,
            resolved.chosen,
            settings.get("system"),
            settings.get("raw", False),
            keep=keep,
            ordered=ordered,
            calibration=calibrated,
            abstain_below=sure.abstain_below,
        )
        self.runner.forget()  # a batch is the same whatever came before it
        items = (parse_object(number, line) for number, line in enumerate(lines, start=1))
        return Batch(self.backend, items, shared, runner=self.runner, warn=warn_in_python).rows()

    def close(self) -> None:
        """Free the model's memory; it cannot be used afterwards."""
        if self._open:
            self._open = False
            self.backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if not self._open:
            raise UsageError("the model is closed", "load it again")

    def _ask(
        self, prompt: Prompt, method: Method, settings: Settings
    ) -> Iterator[Token | Completed | Answered]:
        self._check_open()
        resolved = self._resolved(settings)
        plan = method.plan(resolved.plan, resolved.chosen)
        encode = partial(prompt_tokens, self.backend)
        question = Question(self._asked(prompt, settings), plan, encode, at_once=True)
        return ask_one(self.runner, method.collecting, question)

    def _subject(self, method: Method, settings: Settings, calibration: Calibration | None) -> Subject:
        """Whose confidence it is; warns where a calibration was made for another's."""
        resolved = self._resolved(settings)
        subject = subject_of(self.backend.info.name, method, method.plan(resolved.plan, resolved.chosen))
        differing = None if calibration is None else calibration.mismatch(subject)
        if differing is not None:
            warn_in_python(differing)
        return subject

    def _asked(self, prompt: Prompt, settings: Settings) -> Asked:
        system = settings.get("system")
        if settings.get("raw", False):
            if not isinstance(prompt, str) or system is not None:
                raise UsageError("a raw prompt is one text, without roles")
            return prompt
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*prompt]
        return for_template(self.backend.info, with_system(messages, system), warn_in_python)

    def _resolved(self, settings: Settings) -> Resolved:
        """The settings over the model's own. Raises UsageError for unknown names and values out of range."""
        own = {name: value for name, value in settings.items() if name not in ("em", "system", "raw")}
        given = GENERATION.read({**own, **_em_keywords(settings)}, NAMES)
        em = settings.get("em")
        base = Plan(SamplingParams(em=None if isinstance(em, bool | str) else em))
        return resolve_settings(("keyword", given), base=base, words=NAMES).with_model(
            self.backend.info.sampling
        )


def _chosen(method: Method | str | None) -> Method:
    return method if isinstance(method, Method) else Method(method)


def _confidence_options(calibration: str | Path | None, abstain_below: float | None) -> ConfidenceOptions:
    given = CONFIDENCE.read({"calibration": calibration, "abstain_below": abstain_below}, NAMES)
    return options_of(ConfidenceOptions, ("keyword", given))


def _em_keywords(settings: Settings) -> Given:
    """What `em` says, as the settings that it stands for."""
    em = settings.get("em")
    if em is None or not isinstance(em, bool | str):
        return {}
    said = "em_preset" if isinstance(em, str) else "em_inf"
    if said in settings:
        raise UsageError(f"em and {said} are the same setting", "give one of them")
    return {said: em}
