"""One command's options from its arguments, and its help: argparse, told by a dataclass.

A command's module has `Options`, a frozen dataclass, or `SUBCOMMANDS`, several by name. A field is an option,
`--its-name`, whose help is the text below it in the source and whose default is the field's. Annotated adds what a type
does not say: `Positional("DENSE_DIR")` for an argument known by its place, a plain text for the metavar, `REPEATED` for
an option that may be given again.
"""

import argparse
import ast
import dataclasses
import functools
import inspect
import os
import shutil
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NoReturn

from earthshine.errors import ConfigError, nearest
from earthshine.files import expand_home

MAX_COLUMNS = 100  # of help; longer lines are hard to read
REPEATED = "may be given again"
_HELP_FLAGS = frozenset({"-h", "--help"})
_METAVARS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}
_PATHS_AS_TEXT = {"run", "job"}  # of `train`, where they may be empty or a recipe's name
_KINDS = {int: "an integer", float: "a number"}


@dataclasses.dataclass(frozen=True)
class Positional:
    """Marks an argument that is known by its place; `metavar` is its name in help and messages."""

    metavar: str


def parse(command: ModuleType, name: str, args: Sequence[str]) -> Any:
    """The command's options. Raises ConfigError, with the nearest name, for arguments that are none of its own."""
    options, prog, args = _chosen(command, f"earthshine {name}", list(args))
    parser = _parser(options, prog)
    values, rest = parser.parse_known_intermixed_args(_spelled(options, prog, args))
    if rest:
        parser.error(f"there is no {'option' if rest[0].startswith('-') else 'place for'} '{rest[0]}'")
    required = [(field, about) for field, _, about in _fields(options) if field.default is dataclasses.MISSING]
    missing = [_label(field, about) for field, about in required if getattr(values, field.name) in (None, [])]
    if missing:
        parser.error(f"{_name(prog)} needs {', '.join(missing)}")
    return options(
        **{field.name: _usable(field.name, getattr(values, field.name)) for field in dataclasses.fields(options)}
    )


def asks_for_help(args: Sequence[str]) -> bool:
    return not _HELP_FLAGS.isdisjoint(args)


def help_text(command: ModuleType, name: str, args: Sequence[str] = ()) -> str:
    """Usage, description, options and worked examples of a command, or of the subcommand that `args` name."""
    prog = f"earthshine {name}"
    subcommands: Mapping[str, Any] = getattr(command, "SUBCOMMANDS", {})
    named = [arg for arg in args if arg in subcommands]
    if subcommands and not named:
        return _overview(command, prog)
    options = subcommands[named[0]] if named else command.Options
    description = inspect.getdoc(options) or "" if named else command.DESCRIPTION
    parser = _parser(options, " ".join([prog, *named[:1]]))
    parser.description = wrapped(description)
    lines = [(text, line) for text, line in command.EXAMPLES if not named or f" {named[0]} " in line]
    return parser.format_help() + _examples(lines)


def wrapped(text: str) -> str:
    """Paragraphs, filled to the terminal's width."""
    return "\n\n".join(
        textwrap.fill(" ".join(paragraph.split()), columns(), break_long_words=False, break_on_hyphens=False)
        for paragraph in text.split("\n\n")
    )


def columns() -> int:
    """The terminal's width, at most 100; 100 where there is none."""
    return min(shutil.get_terminal_size((MAX_COLUMNS, 24)).columns, MAX_COLUMNS)


def listed(names: Mapping[str, str]) -> str:
    """Names, each with what it is, as lines of help."""
    width = max(map(len, names))
    filler = functools.partial(
        textwrap.fill, width=max(columns(), width + 24), subsequent_indent=" " * (width + 4), break_on_hyphens=False
    )
    return "\n".join(filler(f"  {name:<{width}}  {text}") for name, text in names.items())


def _overview(command: ModuleType, prog: str) -> str:
    """Help of a command that has subcommands."""
    about = {name: _first_paragraph(options) for name, options in command.SUBCOMMANDS.items()}
    return (
        f"usage: {prog} {{{','.join(about)}}} [OPTIONS]\n\n{wrapped(command.DESCRIPTION)}\n\nsubcommands:\n"
        f"{listed(about)}\n\noptions:\n{listed({'-h, --help': f'this page; `{prog} SUBCOMMAND --help` has its own'})}\n"
        f"{_examples(command.EXAMPLES)}"
    )


def _first_paragraph(options: type) -> str:
    return " ".join((inspect.getdoc(options) or "").partition("\n\n")[0].split())


def _examples(lines: Sequence[tuple[str, str]]) -> str:
    return "\nexamples:\n" + "\n".join(f"  # {comment}\n  {line}" for comment, line in lines)


def _chosen(command: ModuleType, prog: str, args: list[str]) -> tuple[Any, str, list[str]]:
    """The dataclass that the arguments are for: the command's own, or that of the subcommand that they begin with."""
    if not hasattr(command, "SUBCOMMANDS"):
        return command.Options, prog, args
    name = args[0]
    if name.startswith("-"):
        raise ConfigError(
            f"{_name(prog)} needs a subcommand before '{name}': {', '.join(command.SUBCOMMANDS)}. See {prog} --help."
        )
    if name not in command.SUBCOMMANDS:
        suggestion = nearest(name, command.SUBCOMMANDS)
        raise ConfigError(f"{_name(prog)} has no subcommand '{name}'.{suggestion} See {prog} --help.")
    return command.SUBCOMMANDS[name], f"{prog} {name}", args[1:]


def _name(prog: str) -> str:
    """A command without the program's name, which messages begin with."""
    return prog.removeprefix("earthshine ")


class _Parser(argparse.ArgumentParser):
    """argparse whose complaints are ConfigErrors."""

    def error(self, message: str) -> NoReturn:
        option, _, what = message.removeprefix("argument ").partition(": ")
        if what == "expected one argument":
            what += f"; a value that begins with - is written {option}=-VALUE"
        elif what.startswith("ignored explicit argument"):
            what = "it takes no value"
        message = f"{option}: {what}" if what else option
        raise ConfigError(f"{message}{'' if message[-1] in '.?' else '.'} See {self.prog} --help.")


class _Layout(argparse.RawDescriptionHelpFormatter):
    """Help texts filled without a break at the hyphens of names."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)


def _parser(options: Any, prog: str) -> _Parser:
    """The parser of a dataclass."""
    layout = functools.partial(_Layout, width=columns(), max_help_position=28)
    parser = _Parser(prog=prog, add_help=False, allow_abbrev=False, formatter_class=layout)
    places = parser.add_argument_group("arguments")
    named = parser.add_argument_group("options")
    usage = [prog]
    for field, kind, about in _fields(options):
        required = field.default is dataclasses.MISSING  # argparse is not told: it would not name all that is missing
        settings: dict[str, Any] = {"help": _help(options, field), "default": None if required else field.default}
        several, label = _item(kind) is not kind, _label(field, about)
        if _place(about):
            nargs = "*" if several else "?"
            places.add_argument(field.name, metavar=label, type=_reader(kind), nargs=nargs, **settings)
            shown = f"{label} ..." if several else label
            usage.append(shown if required else f"[{shown}]")
            continue
        if kind is bool:
            named.add_argument(label, action="store_true", **settings)
            continue
        metavar = next((a for a in about if isinstance(a, str) and a != REPEATED), None) or _metavar(kind)
        if REPEATED in about:
            settings |= {"action": "append", "default": []}
        elif several:
            settings |= {"nargs": "*"}
        named.add_argument(label, metavar=metavar, type=_reader(kind), **settings)
        usage += [f"{label} {metavar}"] if required else []
    named.add_argument("-h", "--help", action="store_true", help="Show this help.")
    parser.usage = " ".join([*usage, "[OPTIONS]"])
    return parser


def _fields(options: Any) -> Iterator[tuple["dataclasses.Field[Any]", Any, tuple[Any, ...]]]:
    """Each field with its type, without None, and what Annotated adds to it."""
    hints = typing.get_type_hints(options, include_extras=True)
    for field in dataclasses.fields(options):
        kind, about = hints[field.name], ()
        if typing.get_origin(kind) is typing.Annotated:
            kind, *about = typing.get_args(kind)  # type: ignore[assignment]
        if typing.get_origin(kind) in (typing.Union, types.UnionType):
            (kind,) = (k for k in typing.get_args(kind) if k is not type(None))
        yield field, kind, tuple(about)


def _place(about: tuple[Any, ...]) -> Positional | None:
    return next((a for a in about if isinstance(a, Positional)), None)


def _label(field: "dataclasses.Field[Any]", about: tuple[Any, ...]) -> str:
    """An argument's name in help and messages: its metavar, or its flag."""
    place = _place(about)
    return place.metavar if place else f"--{field.name.replace('_', '-')}"


def _item(kind: Any) -> Any:
    """The type of one value: a tuple's items', else the type itself."""
    return typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else kind


def _metavar(kind: Any) -> str:
    item = _item(kind)
    return "|".join(typing.get_args(item)) if typing.get_origin(item) is Literal else _METAVARS[item]


def _reader(kind: Any) -> Callable[[str], Any]:
    """Text of the command line -> one value. Raises argparse's error, which names the option."""
    item = _item(kind)
    choices = typing.get_args(item) if typing.get_origin(item) is Literal else ()

    def read(text: str) -> Any:
        if choices:
            if text not in choices:
                known = f" Known: {', '.join(choices)}."
                raise argparse.ArgumentTypeError(f"'{text}' is not one of its values.{nearest(text, choices) or known}")
            return text
        try:
            return item(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is not {_KINDS[item]}") from None

    return read


def _help(options: Any, field: "dataclasses.Field[Any]") -> str:
    """The text below a field in its class's source, and its default where that says something."""
    text = _texts(options).get(field.name, "")
    default = field.default
    if default is dataclasses.MISSING:
        note = "(required)"
    elif default is None or isinstance(default, bool) or default in ("", ()):
        note = ""
    else:
        note = f"(default: {default})"
    return f"{text} {note}".strip().replace("%", "%%")


@functools.cache
def _texts(options: Any) -> dict[str, str]:
    """The texts below the fields of a class; none where its source is not there."""
    try:
        source = inspect.getsource(options)
    except OSError:
        return {}
    (tree,) = ast.parse(textwrap.dedent(source)).body
    texts = {}
    for node, after in zip(tree.body, tree.body[1:], strict=False):  # type: ignore[attr-defined]
        if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            texts[ast.unparse(node.target)] = " ".join(str(after.value.value).split())
    return texts


def _spelled(options: Any, prog: str, args: Sequence[str]) -> list[str]:
    """The arguments with hyphens in the names of options: `--max_new_tokens` is `--max-new-tokens`.

    Raises ConfigError for an unknown option: argparse would first say what is missing, which most often is what was
    misspelled.
    """
    known = {_label(field, about) for field, _, about in _fields(options) if not _place(about)}
    spelled: list[str] = []
    for i, arg in enumerate(args):
        if arg == "--":  # all that follows is positional
            return [*spelled, *args[i:]]
        name, equals, value = arg.partition("=")
        if name.startswith("--") and " " not in name:  # with a space it is a text, to argparse too
            name = name.replace("_", "-")
            if name not in known | _HELP_FLAGS:
                raise ConfigError(f"{_name(prog)} has no option '{name}'.{nearest(name, known)} See {prog} --help.")
        spelled.append(name + equals + value)
    return spelled


def _usable(name: str, value: Any) -> Any:
    """An option's value: a path without `~`, for which shells often do not look; a text in UTF-8, or ConfigError."""
    if isinstance(value, tuple | list):
        return tuple(_usable(name, v) for v in value)
    if isinstance(value, Path):
        return Path(expand_home(str(value)))
    if name in _PATHS_AS_TEXT:
        return expand_home(value)
    if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):  # bytes that Python could not decode
        try:
            return os.fsencode(value).decode()  # only because the locale is not UTF-8
        except UnicodeError as e:
            option = name.replace("_", "-")
            raise ConfigError(f"{option}={value!r} has bytes that are not UTF-8: give it in that encoding.") from e
    return value
