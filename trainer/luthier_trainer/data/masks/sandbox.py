"""Where chat templates run: they are foreign code.

The dialect is that of transformers' chat templates (`transformers.utils.chat_template_utils`): Jinja's immutable
sandbox, trimmed blocks, loop controls, `tojson`, `raise_exception`, `strftime_now` and `{% generation %}`; so what is
trained here is what a server of the model renders. To it come fences, as a sandbox guards attributes and not
resources: a limit on the source, a limit on the characters that one rendering makes in all, intermediate ones
included, and a limit on its time.
"""

import json
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache
from types import BuiltinMethodType, MethodType
from typing import Any, cast

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame, optimizeconst
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from luthier_trainer.data.masks.thread_timer import ThreadTimer
from luthier_trainer.errors import TrainingError

MAX_SOURCE = 512 * 1024
MAX_CHARACTERS = 256 * 1024 * 1024
MAX_TEXT = 16 * 1024 * 1024
MAX_SECONDS = 3.0
STUCK_SECONDS = 10.0

Span = tuple[int, int]

# A run that is resumed tomorrow must see the same tokens, so it is always the same day: the one that Llama 3's
# templates take by default.
TODAY = datetime(2024, 7, 26)

# What makes much of little in one step, or differs from run to run, and what chat templates have no use for.
_NO_FILTERS = ("batch", "center", "filesizeformat", "pprint", "random", "slice", "urlize", "wordwrap", "xmlattr")
_NO_METHODS = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs", "translate"})
_WIDE = re.compile(r"%[^a-zA-Z%]*(?:\d{5}|\*)")
_MAX_BITS = 4096
# What an item of a list counts for, in characters.
_ITEM = 16
# A timer rings up to this many seconds early.
_SOON = 0.01


class _TooMuchError(Exception):
    """More characters than MAX_CHARACTERS."""


class _TooSlowError(BaseException):
    """A fence's time is up. No Exception, so that nothing on the way takes it for one of the template's."""

    def __init__(self, ends: float) -> None:
        super().__init__(ends)
        self.ends = ends


class Compiled:
    """A template that is ready to render; threads take turns. marks_turns: whether it has generation blocks."""

    def __init__(self, environment: "_Environment", template: jinja2.Template) -> None:
        self.marks_turns = environment.marks_turns
        self._environment = environment
        self._template = template
        self._lock = threading.Lock()

    def render(self, variables: Mapping[str, Any]) -> tuple[str, list[Span] | None]:
        """The text, and the character spans of its generation blocks; None for these when a block's text went
        elsewhere than straight into the text.

        Raises TrainingError TEMPLATE_TOO_LARGE or TEMPLATE_TOO_SLOW, and whatever the template raises.
        """
        with self._lock, fence():
            environment = self._environment
            environment.made = 0
            environment.emitted = 0
            environment.blocks = []
            pieces = []
            context = self._template.new_context(dict(variables))
            for piece in self._template.root_render_func(context):
                environment.emitted += len(piece)
                if environment.emitted > MAX_TEXT:
                    raise _TooMuchError
                pieces.append(piece)
            text = "".join(pieces)
            spans: list[Span] | None = []
            for start, block in environment.blocks:
                if spans is None or not text.startswith(block, start):
                    spans = None
                else:
                    spans.append((start, start + len(block)))
            return text, spans


@lru_cache(maxsize=64)
def compiled(source: str) -> Compiled:
    """Compiles a template. Raises TrainingError TEMPLATE_INVALID, TEMPLATE_TOO_LARGE or TEMPLATE_TOO_SLOW."""
    if len(source.encode(errors="surrogatepass")) > MAX_SOURCE:
        raise TrainingError("TEMPLATE_TOO_LARGE", f"The chat template is longer than {MAX_SOURCE // 1024} KiB.")
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    for name in _NO_FILTERS:
        del environment.filters[name]
    environment.filters.update(environment.fenced_filters())
    del environment.globals["lipsum"]
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = TODAY.strftime
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    try:
        with fence():
            return Compiled(environment, environment.from_string(source))
    except TrainingError:
        raise
    except jinja2.TemplateSyntaxError as error:
        raise _invalid(f"in line {error.lineno}: {error.message}") from error
    except Exception as error:  # RecursionError, or Python's compiler on what Jinja made of it
        raise _invalid(" ".join(str(error).split())[:300] or type(error).__name__) from error


def _invalid(why: str) -> TrainingError:
    hint = "Correct the template; it is written in Jinja, as transformers' chat templates are."
    return TrainingError("TEMPLATE_INVALID", f"The chat template does not compile, {why}.", hint)


class _Code(CodeGenerator):
    """`~` by way of the environment, which counts."""

    @optimizeconst
    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat((")
        for part in node.nodes:
            self.write("str(")
            self.visit(part, frame)
            self.write("), ")
        self.write("))")


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: around what the model itself says."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        cast(_Environment, self.environment).marks_turns = True
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_block"), [], [], body).set_lineno(line)

    def _block(self, caller: Callable[[], str]) -> str:
        environment = cast(_Environment, self.environment)
        start = environment.emitted
        block = caller()
        environment.blocks.append((start, block))
        return block


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, counting the characters that are made."""

    code_generator_class = _Code
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    marks_turns = False
    made = 0
    emitted = 0
    blocks: list[tuple[int, str]] = []  # noqa: RUF012 - set anew for each rendering

    def spend(self, characters: int) -> None:
        """Counts characters before they are made."""
        self.made += characters
        if self.made > MAX_CHARACTERS:
            raise _TooMuchError

    def concat(self, pieces: Iterable[str]) -> str:
        parts = pieces if isinstance(pieces, list | tuple) else list(pieces)
        self.spend(sum(map(len, parts)))
        return "".join(parts)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            if isinstance(left, str):
                self.spend(len(left) + _size(right))
            elif isinstance(left, list | tuple):
                self.spend(_ITEM * (len(left) + len(right)))
        elif operator == "%":
            if isinstance(left, str) and _WIDE.search(left):
                raise _TooMuchError
            if isinstance(left, str):
                self.spend(len(left) + _size(right))
        elif operator == "*":
            for many, times in ((left, right), (right, left)):
                if isinstance(many, str | list | tuple) and isinstance(times, int):
                    self.spend((1 if isinstance(many, str) else _ITEM) * len(many) * max(times, 0))
            if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > _MAX_BITS:
                raise _TooMuchError
        elif isinstance(left, int) and isinstance(right, int) and left.bit_length() * abs(right) > _MAX_BITS:
            raise _TooMuchError
        return self.binop_table[operator](left, right)

    def call(self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(__obj, BuiltinMethodType | MethodType) and isinstance(text := __obj.__self__, str):
            name = __obj.__name__
            if name in _NO_METHODS:
                raise jinja2.exceptions.SecurityError(f"chat templates cannot use the method {name}")
            if name == "replace":
                self.spend(_replaced_size(text, *args))
            elif name == "join":
                args = (list(args[0]), *args[1:])
                self.spend(sum(map(_size, args[0])) + len(text) * len(args[0]))
            else:
                self.spend(len(text))
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format` without format specifications, which can ask for any width."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        text = str(value.__self__)

        def formatted(*args: Any, **kwargs: Any) -> str:
            if ":" in text:
                raise jinja2.exceptions.SecurityError("chat templates cannot use format specifications")
            self.spend(len(text) + (text.count("{") + 1) * (_size(args) + _size(kwargs)))
            return wrapped(*args, **kwargs)

        return formatted

    def fenced_filters(self) -> dict[str, Callable[..., Any]]:
        """Filters that make much of little, counted; and transformers' own `tojson`."""
        plain = dict(self.filters)

        def replace(eval_ctx: Any, s: str, old: str, new: str, count: int | None = None) -> Any:
            self.spend(_replaced_size(str(s), str(old), str(new)))
            return plain["replace"](eval_ctx, s, old, new, count)

        def join(eval_ctx: Any, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> Any:
            values = list(value)
            self.spend(sum(map(_size, values)) + len(str(d)) * len(values))
            return plain["join"](eval_ctx, values, d, attribute)

        def indent(s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> Any:
            by = width if isinstance(width, int) else len(width)
            self.spend(len(s) + (s.count("\n") + 1) * by)
            return plain["indent"](s, width, first, blank)

        def format_(value: str, *args: Any, **kwargs: Any) -> Any:
            if _WIDE.search(str(value)):
                raise _TooMuchError
            self.spend(len(str(value)) + _size(args) + _size(kwargs))
            return plain["format"](value, *args, **kwargs)

        def rounded(value: float, precision: int = 0, method: Any = "common") -> float:
            if abs(precision) > 1000:
                raise _TooMuchError
            return cast(float, plain["round"](value, precision, method))

        def total(environment: Any, iterable: Iterable[Any], attribute: Any = None, start: Any = 0) -> Any:
            if not isinstance(start, int | float):
                raise jinja2.exceptions.SecurityError("chat templates can only sum numbers")
            return plain["sum"](environment, iterable, attribute, start)

        def tojson(
            x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
        ) -> str:
            if indent is not None and (indent if isinstance(indent, int) else len(indent)) > 64:
                raise _TooMuchError
            text = json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
            self.spend(len(text))
            return text

        return {
            "replace": jinja2.pass_eval_context(replace),
            "join": jinja2.pass_eval_context(join),
            "indent": indent,
            "format": format_,
            "round": rounded,
            "sum": jinja2.pass_environment(total),
            "tojson": tojson,
        }


class _Dict:
    """`dict` without its attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """`namespace`; names with an underscore are not for templates."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        names = dict(*args[1:], **kwargs)
        for name in names:
            _checked(name)
        jinja2.utils.Namespace.__init__(args[0], names)

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(_checked(name), value)


def _checked(name: str) -> str:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"chat templates cannot store the attribute {name!r}")
    return name


def _raise_exception(message: Any) -> None:
    raise jinja2.exceptions.TemplateError(str(message))


def _size(value: Any) -> int:
    """About how many characters a value is as text: exact for text, not less than half of it for the rest."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(_size(key) + _size(each) for key, each in value.items())
    if isinstance(value, list | tuple):
        return sum(map(_size, value))
    return 8


def _replaced_size(text: str, old: Any = "", new: Any = "", *_: Any) -> int:
    return len(text) + text.count(str(old)) * len(str(new))


def end_process_when_stuck() -> None:
    """From now on a rendering, or a compilation, that is in C code and hears no signal ends the process with SIGPROF
    when the main thread has worked on it for STUCK_SECONDS: comparing two values that are made of each other takes no
    memory and never ends. To be called in the main thread of a process whose work is all that would be lost."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    _Clock.killer = ThreadTimer(signal.SIGPROF)


@contextmanager
def fence() -> Iterator[None]:
    """Ends its body, one rendering, when it makes too much or takes too long. Raises TrainingError TEMPLATE_TOO_LARGE
    or TEMPLATE_TOO_SLOW."""
    with _fence(MAX_SECONDS, "on one row"):
        if _Clock.ends:
            _keep_alive()
        yield


@contextmanager
def row_fence(turns: int) -> Iterator[None]:
    """The same around all the renderings that are made of one row: it may take longer the more turns it has, up to ten
    times as long, as each may be proven by renderings of its own."""
    with _fence(MAX_SECONDS * min(1 + turns / 20, 10), f"on one row of {turns:,} turns"):
        yield


@contextmanager
def _fence(seconds: float, what: str) -> Iterator[None]:
    ends = time.thread_time() + seconds
    try:
        with _deadline(ends):
            yield
    except (_TooMuchError, MemoryError):
        message = "The chat template makes more text of one row than there is room for."
        raise TrainingError("TEMPLATE_TOO_LARGE", message, "Take out of it what multiplies text.") from None
    except _TooSlowError as error:
        if error.ends != ends:
            raise  # the time of a fence around this one is up
        message = f"The chat template works {what} for more than {seconds:g} seconds."
        hint = "Take loops out of it, or make the row shorter."
        raise TrainingError("TEMPLATE_TOO_SLOW", message, hint) from None


@contextmanager
def _deadline(ends: float) -> Iterator[None]:
    """Ends its body when this thread's own time is `ends`: a machine that sleeps or is busy is not the template's
    doing. Only in the main thread, where signals arrive, and where nobody else uses this one."""
    if not _armed():
        yield
        return
    around = len(_Clock.ends)
    try:
        _Clock.ends.append(ends)
        if not around:
            _set_alarm()
        yield
    finally:
        del _Clock.ends[around:]
        if not around:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            if _Clock.killer is not None and _Clock.kept_alive is not None:
                _Clock.killer.set(0)
                _Clock.kept_alive = None


class _Clock:
    """ends: of the fences that the main thread is in, the outermost first, in seconds of the thread's time; ours:
    whether the signal is; killer: what ends the process when the signal is not heard; kept_alive: when that was set."""

    ends: list[float] = []  # noqa: RUF012 - there is one clock
    ours = False
    killer: ThreadTimer | None = None
    kept_alive: float | None = None


def _armed() -> bool:
    if threading.current_thread() is not threading.main_thread():
        return False
    if not _Clock.ours and signal.getsignal(signal.SIGVTALRM) is signal.SIG_DFL:
        signal.signal(signal.SIGVTALRM, _ring)
        _Clock.ours = True
    return _Clock.ours


def _set_alarm() -> None:
    """Not later than MAX_SECONDS from now: then it is in time for any fence within, and those need not set it anew."""
    left = min(min(_Clock.ends) - time.thread_time(), MAX_SECONDS)
    signal.setitimer(signal.ITIMER_VIRTUAL, max(left, _SOON))


def _keep_alive() -> None:
    """Gives the rendering that begins now at least STUCK_SECONDS - 1 until the process is ended: the timer is set anew
    each second, as it costs more than many a rendering."""
    if _Clock.killer is None:
        return
    now = time.thread_time()
    if _Clock.kept_alive is None or now - _Clock.kept_alive > 1:
        _Clock.kept_alive = now
        _Clock.killer.set(STUCK_SECONDS)


def _ring(*_: object) -> None:
    """The timer counts all threads of the process: when others spent it, this one gets the rest."""
    if not _Clock.ends:
        return
    if min(_Clock.ends) - time.thread_time() <= _SOON:
        raise _TooSlowError(min(_Clock.ends))
    _set_alarm()
