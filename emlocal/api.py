"""Python's front door: load a model, then generate, stream or run a batch.

    import emlocal

    with emlocal.load("smollm2:135m", parallel=8) as model:
        print(model.generate("Why is the sky blue?", em=True).text)
        for piece in model.stream("Tell me a story.", em="paper", seed=7):
            print(piece, end="")
        for row in model.batch(["2+2?", {"prompt": "3+3?", "temperature": 0}], em=True):
            print(row["text"])

Settings have the names of the fields of SamplingParams and EMInf. A setting that is not given comes from the
model's file, then from emlocal's defaults. Only the command line reads the config file.
"""

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypedDict, TypeVar, Unpack
from weakref import WeakSet

from emlocal.answers.tool_calls import ToolCall, parsed
from emlocal.backends.base import Backend
from emlocal.batch.lines import Row, parse_object
from emlocal.batch.messages import tools_in
from emlocal.batch.run import Batch, BatchSettings
from emlocal.em.scores import Scores
from emlocal.errors import UsageError
from emlocal.generation import Completed, Completion, Scheduler, Timings, Token
from emlocal.generation.dialogue import Dialogue
from emlocal.generation.prompt import Asked, for_template, once, prompt_tokens, with_system
from emlocal.generation.sample import EntropySummary, summarize
from emlocal.generation.scheduler import SPARE_SEQUENCES
from emlocal.generation.speculation import Speculation, speculation_of
from emlocal.loading import load as load_shared
from emlocal.loading import load_for_batch, warn_in_python
from emlocal.methods import Chosen
from emlocal.methods.asking import Answered, Question, ask_one
from emlocal.methods.confidence import Calibration, Subject, confidence_of, read_calibration, subject_of
from emlocal.methods.hints import without_effect
from emlocal.methods.scoring import scores_of
from emlocal.models.templates import Message
from emlocal.sampling import Draw, EMStep, SamplingParams
from emlocal.settings import Given, Plan, Resolved, resolve_settings
from emlocal.settings.confidence import CONFIDENCE, ConfidenceOptions
from emlocal.settings.options import ENGINE, BackendName, EngineOptions, KVName, SpeculateName
from emlocal.settings.resolve import GENERATION
from emlocal.settings.table import NAMES, options_of

Method = Chosen
"""A way to answer prompts: `Method("self-consistency", samples=8)`, `Method("em-inf:paper")`."""
_T = TypeVar("_T")
_KEPT = 1  # further sequences, for earlier conversations; they share room
Prompt = str | Sequence[Message]
"""A question, or messages of a conversation ({"role", "content"}). Where the last is the assistant's, the
answer goes on from it."""


class Settings(TypedDict, total=False):
    """The keywords of `generate`, `stream` and `batch`: the settings, and `em`, `system` and `raw`."""

    em: bool | str | EMStep | None
    """True: EM-INF. A preset's name. EMInf(...) or AdaptiveTemperature(...). None or False: off."""
    system: str
    raw: bool
    """Whether the prompt goes to the model unchanged, without its chat template."""
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
    """The number that fixes all draws; 0 by default, so that the same call gives the same answer."""
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
    json_schema: str | Mapping[str, Any]
    """A schema; the answer is JSON that it allows, and `json.loads(answer.text)` reads it."""
    regex: str
    grammar: str
    """A grammar that the answer matches, in Lark's or llama.cpp's (GBNF) notation."""
    think: bool
    """Whether a model that can think does so before it answers; the model's default if not given."""
    think_budget: int
    """The number of tokens after which a thought is ended."""
    reasoning_effort: str
    chat_template_kwargs: str | Mapping[str, Any]
    """Further variables for the chat template: texts, numbers, true or false."""
    em_where: str
    """The part that takes EM steps: all, thought or answer."""


@dataclass(frozen=True)
class Answer:
    """The answer to a prompt, with its statistics."""

    text: str
    finish_reason: str
    """ "stop", "length" (max_tokens reached) or "context" (context full)."""
    tokens: list[int]
    draws: list[Draw]
    """One for each token: entropies in nats, EM steps, probabilities."""
    timings: Timings
    completions: Sequence[Completion] = ()
    """All samples, if the method draws several."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """The method's own results; for self-consistency "answer" and "votes"."""
    confidence: float | None = None
    """The confidence in the answer, from 0 to 1 (docs/confidence.md); None if the answer has no tokens."""
    calibrated: bool = False
    """Whether a calibration of this model and method was applied.

    `confidence` is then the share of right answers among answers like this one.
    """
    scores: Scores | None = None
    """Scores of how sure the model was while it wrote the answer, from entropies and probabilities."""
    complete: bool | None = None
    """Whether the text is all that `json_schema`, `regex` or `grammar` asks for; None without one. An answer
    that was cut off may not be."""
    tool_calls: Sequence[ToolCall] = ()
    """Calls of tools in the text, in the forms of Hermes and Qwen, Llama 3 and Mistral."""
    reasoning: str = ""
    """The model's thoughts before the answer."""
    reasoning_tokens: int = 0
    """How many of `tokens`, from the first on, are thoughts and their marks."""

    @property
    def entropy(self) -> EntropySummary:
        """The summary of entropies and EM steps over the answer."""
        return summarize(self.draws)


def load(
    name: str | Path | None = None,
    *,
    parallel: int = 1,
    backend: BackendName = "auto",
    context: int | None = None,
    threads: int | None = None,
    kv_type: KVName | None = None,
    gpu_layers: int | str | None = None,
    adapters: Sequence[tuple[Path, float]] = (),
    offline: bool = False,
    speculate: SpeculateName = "off",
) -> "Model":
    """Loads a model. None is the starter model, which is downloaded if it is missing.

    Args:
        name: as on the command line: "smollm2:135m", a .gguf file, a model folder, "org/name:QUANT".
        parallel: how many prompts `batch` answers at once; each takes the memory of a whole context.
        context: length of a sequence in tokens. None: the model's own length, at most 8,192, or 2,048 in
            parallel.
        gpu_layers: in llama.cpp: how many layers go to GPUs, "all" or "auto". None: auto.
        adapters: (LoRA adapter, scale): GGUF files, PEFT or MLX folders.
        speculate: as on the command line: guess tokens, and verify several in one pass.
    Raises:
        ModelError: the model or an adapter does not exist, or cannot be used.
        UsageError: the engine does not exist, or the context length is not possible.
    """
    model = None if name is None else str(name)
    layers = None if gpu_layers is None else ENGINE.read({"gpu_layers": gpu_layers}, NAMES)["gpu_layers"]
    mode = ENGINE.read({"speculate": speculate}, NAMES)["speculate"]
    wanted = EngineOptions(model, backend, (), context, threads, kv_type, offline, layers)
    if parallel == 1:
        engine = load_shared(wanted, adapters, sequences=1 + SPARE_SEQUENCES + _KEPT).backend
    else:
        engine = load_for_batch(wanted, parallel, adapters).backend
    return Model(engine, parallel, speculation_of(mode, engine, warn_in_python))


class Model:
    """A loaded model. Not for use from two threads at once. A context manager: `close` frees its memory."""

    def __init__(self, backend: Backend, parallel: int, speculation: Speculation | None = None) -> None:
        """Wraps a loaded engine; called by `load`.

        `backend` has room for `SPARE_SEQUENCES` more sequences than `parallel`. Any further room keeps
        earlier conversations.
        """
        self.backend = backend
        self.parallel = parallel
        self.runner = Scheduler(backend, parallel, speculation)
        self._open = True
        self._answering: WeakSet[Generator[Any, None, None]] = WeakSet()

    def generate(
        self,
        prompt: Prompt,
        *,
        method: Method | str | None = None,
        calibration: str | Path | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **settings: Unpack[Settings],
    ) -> Answer:
        """Answers a prompt.

        Args:
            prompt: a question, or the messages of a conversation.
            method: as for `batch`.
            calibration: a file of `emlocal eval --calibrate`, for the confidence.
            tools: what the model may call, as OpenAI's API has it; the calls are in the answer.
        Raises UsageError for settings out of range, ContextFullError for a prompt that does not fit.
        """
        chosen, sure = _chosen(method), _confidence_options(calibration, None)
        calibrated = None if sure.calibration is None else read_calibration(sure.calibration)
        subject = self._subject(chosen, settings, calibrated)
        offered = tools_in({"tools": None if tools is None else [*tools]})
        for event in self._ask(prompt, chosen, settings, offered):
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
            done.complete,
            parsed(done.text, [tool["function"]["name"] for tool in offered or ()]).calls,
            done.reasoning,
            done.reasoning_tokens,
        )

    def stream(
        self, prompt: Prompt, *, method: Method | str | None = None, **settings: Unpack[Settings]
    ) -> Iterator[str]:
        """Yields the answer's text, piece by piece as it becomes certain.

        A method that finds its answer only at the end yields it in one piece. Takes the arguments of
        `generate` and raises the same errors.
        """
        chosen = _chosen(method)
        for event in self._while_open(self._ask(prompt, chosen, settings)):
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
        """Answers many prompts, `parallel` of them at once, and yields the rows of `emlocal batch`.

        Args:
            lines: prompts, or objects as in a line of `emlocal batch`'s input; read as they are needed.
            method: a name such as "self-consistency:8", or with settings: `Method("min-p", samples=8)`.
            ordered: yield rows in the order of the lines; otherwise as they are finished.
            keep: copy a line's other fields to the row, under "kept".
            calibration: a file of `emlocal eval --calibrate`, for the confidence.
            abstain_below: withhold answers with less confidence: "abstained" is true, "text" None.
        A line that cannot be answered becomes a row with "error". Raises UsageError for bad settings.
        """
        self._check_open()
        if isinstance(lines, str):
            raise UsageError("lines is one text; a batch takes a list")
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
        self.runner.forget()  # so that earlier conversations do not change a batch
        items = (parse_object(number, line) for number, line in enumerate(lines, start=1))
        batch = Batch(self.backend, items, shared, runner=self.runner, warn=warn_in_python)
        return self._while_open(batch.rows())

    def close(self) -> None:
        """Frees the model's memory. The model cannot be used afterwards; answers that run end."""
        if self._open:
            self._open = False
            for answering in [*self._answering]:
                answering.close()  # gives its sequences back while the engine is there
            self.backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _while_open(self, answering: Generator[_T, None, None]) -> Iterator[_T]:
        """Yields what `answering` yields; raises UsageError once the model is closed."""
        self._answering.add(answering)
        try:
            while True:
                self._check_open()
                try:
                    item = next(answering)
                except StopIteration:
                    return
                yield item
        finally:
            answering.close()

    def _check_open(self) -> None:
        if not self._open:
            raise UsageError("the model is closed", "load it again")

    def _ask(
        self,
        prompt: Prompt,
        method: Method,
        settings: Settings,
        tools: tuple[Mapping[str, Any], ...] | None = None,
    ) -> Generator[Token | Completed | Answered, None, None]:
        self._check_open()
        resolved = self._resolved(settings)
        plan = method.plan(resolved.plan, resolved.chosen)
        encode = partial(prompt_tokens, self.backend, warn=once(warn_in_python))
        question = Question(self._asked(prompt, settings, tools), plan, encode, at_once=True)
        return ask_one(self.runner, method.collecting, question)

    def _subject(self, method: Method, settings: Settings, calibration: Calibration | None) -> Subject:
        """Returns the model and method that a confidence is about.

        Warns if its calibration is for others, and of settings without effect.
        """
        resolved = self._resolved(settings)
        plan = method.plan(resolved.plan, resolved.chosen)
        for text in without_effect(plan, self.backend.info, raw=settings.get("raw", False)):
            warn_in_python(text)
        subject = subject_of(self.backend.info.name, method, plan)
        differing = None if calibration is None else calibration.mismatch(subject)
        if differing is not None:
            warn_in_python(differing)
        return subject

    def _asked(
        self, prompt: Prompt, settings: Settings, tools: tuple[Mapping[str, Any], ...] | None
    ) -> Asked:
        system = settings.get("system")
        if settings.get("raw", False):
            if not isinstance(prompt, str) or system is not None or tools:
                raise UsageError("a raw prompt must be one text, without roles or tools")
            return prompt
        said = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*prompt]
        messages = Dialogue(tuple(said), tools)
        return for_template(self.backend.info, with_system(messages, system), warn_in_python)

    def _resolved(self, settings: Settings) -> Resolved:
        """Returns the settings over the model's own.

        Raises UsageError for unknown names and values out of range.
        """
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
    """Returns the value of `em` as the settings that it stands for."""
    em = settings.get("em")
    if em is None or not isinstance(em, bool | str):
        return {}
    said = "em_preset" if isinstance(em, str) else "em_inf"
    if said in settings:
        raise UsageError(f"em and {said} are the same setting", "give only one of them")
    return {said: em}
