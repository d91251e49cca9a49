"""What a report says, apart from how it looks: elements that both the HTML page and the Markdown file are made from.

In texts, `code` between backticks and **bold** between double asterisks are marked up; all else is literal.
"""

import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Tone = Literal["", "good", "bad", "quiet", "up", "down"]  # bad: a check that does not hold, and nothing else


@dataclass(frozen=True)
class Text:
    """A paragraph. kind "absent" says what the run folders lack; "note" how to read what stands above."""

    text: str
    kind: Literal["plain", "note", "absent"] = "plain"


@dataclass(frozen=True)
class Bullets:
    items: tuple[tuple[str, Tone], ...]


@dataclass(frozen=True)
class Cell:
    """A table cell. `fraction`, 0 to 1, draws a small bar under the text; `color` a swatch of that run's color."""

    text: str
    tone: Tone = ""
    fraction: float | None = None
    color: int | None = None


@dataclass(frozen=True)
class Table:
    """Row headers are the first column. `numeric` are the columns set flush right; `folded` hides it behind a line."""

    caption: str
    headers: tuple[str, ...]
    rows: tuple[tuple[Cell | str, ...], ...]
    numeric: frozenset[int] = frozenset()
    folded: bool = False


@dataclass(frozen=True)
class Card:
    """A number to be seen first. `facts` are smaller ones below it, each with its name."""

    label: str
    value: str
    detail: str
    tone: Tone = ""
    color: int | None = None
    facts: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Cards:
    cards: tuple[Card, ...]


@dataclass(frozen=True)
class LegendItem:
    """One entry of a legend: a line of color `color`, a patch of that class, a dashed reference, a dotted change."""

    label: str
    color: int = 0
    mark: Literal["line", "reference", "band", "point", "change"] = "line"


@dataclass(frozen=True)
class Drawing:
    """One SVG element, or the same drawing for wide and for narrow screens.

    title: above a panel. full: a panel as wide as the figure, however many there are.
    """

    wide: str
    narrow: str = ""
    title: str = ""
    full: bool = False


@dataclass(frozen=True)
class Figure:
    """Drawings side by side under one legend, with the numbers behind them as a table."""

    title: str
    caption: str
    drawings: tuple[Drawing, ...]
    legend: tuple[LegendItem, ...] = ()
    numbers: Table | None = None


@dataclass(frozen=True)
class Sides:
    """Texts side by side: rows of (heading, cells), one cell per column."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class Link:
    """A file or folder, at a path relative to the page that is percent-encoded."""

    text: str
    href: str


@dataclass(frozen=True)
class Links:
    links: tuple[Link, ...]


@dataclass(frozen=True)
class Code:
    """Text to be copied: on the page a button does it."""

    text: str
    language: str = ""
    summary: str = ""  # when given, the code is folded behind this line


Element = Text | Bullets | Table | Cards | Figure | Sides | Links | Code


@dataclass(frozen=True)
class Section:
    """`short` is the title in the page's navigation."""

    anchor: str
    short: str
    title: str
    elements: tuple[Element, ...]


@dataclass(frozen=True)
class Report:
    """`verdict` is its first sentence; `stem` is the name of its files, without their endings."""

    title: str
    verdict: str
    sections: tuple[Section, ...]
    stem: str = "report"


_UNSEEN = (*range(0x20), *range(0x7F, 0xA0), 0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_SPELLED_OUT = {c: f"\u27e8U+{c:04X}\u27e9" for c in _UNSEEN if chr(c) not in "\t\n"}


def clean(text: str) -> str:
    """Text that any file can hold and that shows what it is: control characters and changes of text direction are
    spelled out, lone surrogates replaced."""
    return text.encode("utf-8", "replace").decode("utf-8").replace("\r\n", "\n").translate(_SPELLED_OUT)


def percent_encoded(path: str) -> str:
    """A relative path as the target of a link: every character is read as part of a name."""
    return urllib.parse.quote(path.encode("utf-8", "surrogateescape"))


def cell_text(cell: Cell | str) -> str:
    return cell.text if isinstance(cell, Cell) else cell


def to_markdown(report: Report) -> str:
    """The report as Markdown: tables as tables, figures as their captions and numbers."""
    parts = [f"# {inline_markdown(report.title)}", inline_markdown(report.verdict)]
    for section in report.sections:
        parts.append(f"## {inline_markdown(section.title)}")
        parts += [markdown_element(element) for element in section.elements]
    return clean("\n\n".join(part for part in parts if part)) + "\n"


def split_code(text: str) -> list[str]:
    """Pieces of text and of `code` in turn, starting with text. A backtick without its partner is an apostrophe."""
    if text.count("`") % 2:
        text = "'".join(text.rsplit("`", 1))
    return text.split("`")


_LITERAL = {ord(c): f"\\{c}" for c in "\\|[_~"} | {ord("&"): "&amp;", ord("<"): "&lt;", ord(">"): "&gt;"}


def inline_markdown(text: str, *, in_table: bool = False) -> str:
    """Literal outside backticks: what Markdown or HTML would interpret is escaped; **bold** stays.

    Code spans end where `split_code` ends them, whatever the text holds: runs of backticks, which Markdown would pair
    by length, are broken up, lines are joined, and in a table code that contains "|" is set as plain text.
    """
    out = ""
    for i, piece in enumerate(split_code(text.replace("\r", " ").replace("\n", " "))):
        if i % 2 == 0 or (in_table and "|" in piece):
            out += piece.translate(_LITERAL)
        elif piece:
            out += (" " if out.endswith("`") else "") + f"`{piece}`"
    return out


def markdown_element(element: Element) -> str:
    if isinstance(element, Text):
        return f"> {inline_markdown(element.text)}" if element.kind != "plain" else inline_markdown(element.text)
    if isinstance(element, Bullets):
        return "\n".join(f"- {inline_markdown(item)}" for item, _ in element.items)
    if isinstance(element, Cards):
        return "\n".join(map(_markdown_card, element.cards))
    if isinstance(element, Links):
        return "\n".join(f"- [{_link_text(link.text)}]({link.href})" for link in element.links)
    if isinstance(element, Table):
        return _markdown_table(element)
    if isinstance(element, Figure):
        head = f"**{inline_markdown(element.title)}** (drawn in the HTML page). {inline_markdown(element.caption)}"
        return head + ("\n\n" + _markdown_table(element.numbers) if element.numbers else "")
    if isinstance(element, Code):
        return (f"{inline_markdown(element.summary)}\n\n" if element.summary else "") + fence(
            element.text, element.language
        )
    parts = [f"**{inline_markdown(element.caption)}**"]
    for heading, texts in element.rows:
        parts.append(f"{inline_markdown(heading)}")
        for column, text in zip(element.columns, texts, strict=True):
            parts += [f"*{inline_markdown(column)}:*", fence(text)]
    return "\n\n".join(parts)


def _link_text(text: str) -> str:
    """Literal, with no bracket in it that could end the link's text."""
    return inline_markdown(text.replace("`", "'")).replace("]", "\\]")


def _markdown_card(card: Card) -> str:
    facts = "".join(f"; {name} {value}" for name, value in card.facts if value)
    return (
        f"- **{inline_markdown(card.label)}**: {inline_markdown(card.value)} ({inline_markdown(card.detail + facts)})"
    )


def _markdown_table(table: Table) -> str:
    lines = [f"*{inline_markdown(table.caption)}*", ""] if table.caption else []
    lines.append("| " + " | ".join(inline_markdown(h, in_table=True) or " " for h in table.headers) + " |")
    lines.append("|" + "|".join("---:" if i in table.numeric else "---" for i in range(len(table.headers))) + "|")
    lines += ["| " + " | ".join(inline_markdown(cell_text(c), in_table=True) for c in row) + " |" for row in table.rows]
    return "\n".join(lines)


def fence(text: str, language: str = "") -> str:
    """A fenced block whose fence is longer than any run of backticks inside."""
    longest, run = 0, 0
    for ch in text:
        run = run + 1 if ch == "`" else 0
        longest = max(longest, run)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}{language}\n{text}\n{ticks}"


def figure_numbers(caption: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """The table behind a figure: folded, all but the first column numbers."""
    return Table(caption, tuple(headers), tuple(map(tuple, rows)), frozenset(range(1, len(headers))), folded=True)
