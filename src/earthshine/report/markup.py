"""A report as one HTML page: no network, every text escaped, and one fixed script that the page can do without."""

import base64
import hashlib
import re
from collections.abc import Sequence
from html import escape

from earthshine.report.content import (
    Bullets,
    Cards,
    Cell,
    Code,
    Drawing,
    Element,
    Figure,
    LegendItem,
    Links,
    Report,
    Sides,
    Table,
    Text,
    cell_text,
    clean,
    percent_encoded,
    split_code,
)
from earthshine.report.figures import NUM_COLORS, heat_class, marker
from earthshine.report.style import style_sheet

# Shows the copy buttons. A pressed one copies the text beside it, or selects it where copying is not allowed.
SCRIPT = """for(const b of document.querySelectorAll("button.copy")){b.hidden=false;
b.addEventListener("click",async()=>{const p=b.nextElementSibling;let done="Copied";
try{await navigator.clipboard.writeText(p.textContent)}
catch{getSelection().selectAllChildren(p);done=document.execCommand("copy")?"Copied":"Selected"}
b.textContent=done;setTimeout(()=>{b.textContent="Copy"},1600)})}"""

# Nothing may be fetched and only that script may run, whatever texts the run folders contain.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
    f"script-src 'sha256-{base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()}'"
)

MOON = """<svg class="moon" viewBox="0 0 120 120" aria-hidden="true" focusable="false"><defs>
<radialGradient id="moon-dark" cx=".38" cy=".42" r=".75"><stop offset="0" stop-color="#3d5479"/>
<stop offset="1" stop-color="#16233c"/></radialGradient>
<linearGradient id="moon-lit" x1="0" x2="1"><stop offset=".6" stop-color="#cfdcf2"/>
<stop offset="1" stop-color="#fffdf4"/></linearGradient></defs><circle cx="60" cy="60" r="46" fill="url(#moon-dark)"/>
<g fill="#2a3f62" opacity=".75"><circle cx="44" cy="46" r="9"/><circle cx="62" cy="72" r="12"/>
<circle cx="36" cy="74" r="5"/><circle cx="64" cy="38" r="5"/></g>
<path d="M60 14a46 46 0 0 1 0 92a62 62 0 0 0 0-92z" style="fill:url(#moon-lit)"/>
<g fill="#dce8fb"><circle cx="8" cy="22" r="1"/><circle cx="112" cy="8" r="1.3"/><circle cx="4" cy="96" r="1.2"/>
<circle cx="24" cy="6" r=".8"/><circle cx="116" cy="112" r=".9"/></g></svg>"""


def to_html(report: Report) -> str:
    """The page."""
    title, name, stem = escape(clean(report.title)), escape(clean(report.stem)), percent_encoded(report.stem)
    links = "".join(f'<li><a href="#{s.anchor}">{_inline(s.short)}</a></li>' for s in report.sections)
    body = "".join(
        f'<section id="{s.anchor}" aria-labelledby="{s.anchor}-h"><h2 id="{s.anchor}-h">{_inline(s.title)}</h2>'
        + "".join(map(element_html, s.elements))
        + "</section>\n"
        for s in report.sections
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f'<meta name="generator" content="earthshine"><title>{title}</title><link rel="icon" href="data:,">'
        f"<style>{style_sheet()}</style></head>\n<body>"
        '<a class="skip" href="#content">Skip to the content</a>'
        f'<header><div class="in">{MOON}<p class="kind">Earthshine report</p><h1>{title}</h1>'
        f'<p class="lead">{_inline(report.verdict)}</p></div></header>\n'
        f'<nav aria-label="Sections"><div class="in"><ul>{links}</ul></div></nav>\n'
        f'<main id="content"><div class="in">{body}</div></main>\n'
        '<footer><div class="in">Made by <code>earthshine report</code> from the run folders alone. '
        f'The same content is in <a href="{stem}.md">{name}.md</a>, for programs in '
        f'<a href="{stem}.json">{name}.json</a>.</div></footer><script>{SCRIPT}</script></body></html>\n'
    )


def _inline(text: str) -> str:
    """Escaped text with `code` and **bold**."""
    pieces = [escape(piece) for piece in split_code(clean(text))]
    for i, piece in enumerate(pieces):
        pieces[i] = f"<code>{piece}</code>" if i % 2 else re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", piece)
    return "".join(pieces)


def element_html(element: Element) -> str:
    """One element of a section."""
    if isinstance(element, Text):
        kind = "" if element.kind == "plain" else f' class="{element.kind}"'
        return f"<p{kind}>{_inline(element.text)}</p>"
    if isinstance(element, Bullets):
        return _bullets(element)
    if isinstance(element, Cards):
        return _cards(element)
    if isinstance(element, Table):
        return _table(element)
    if isinstance(element, Figure):
        return _figure(element)
    if isinstance(element, Sides):
        return _sides(element)
    if isinstance(element, Links):
        links = "".join(f'<li><a href="{escape(link.href)}">{_inline(link.text)}</a></li>' for link in element.links)
        return f'<ul class="links">{links}</ul>'
    return _code(element)


def _bullets(element: Bullets) -> str:
    plain = " plain" if all(tone == "" for _, tone in element.items) else ""
    items = "".join(f'<li class="{tone}">{_inline(text)}</li>' for text, tone in element.items)
    return f'<ul class="verdicts{plain}">{items}</ul>'


def _cards(element: Cards) -> str:
    cards = []
    for card in element.cards:
        color = "" if card.color is None else f" k{card.color % NUM_COLORS}"
        cards.append(
            f'<dl class="card {card.tone}{color}" style="margin:0"><dt>{_inline(card.label)}</dt>'
            f'<dd class="value">{_inline(card.value)}</dd><dd class="detail">{_inline(card.detail)}</dd>'
            + "".join(
                f'<div class="fact"><dt>{_inline(name)}</dt><dd>{_inline(value)}</dd></div>'
                for name, value in card.facts
            )
            + "</dl>"
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def _table(table: Table) -> str:
    def kind(column: int) -> str:
        return ' class="num"' if column in table.numeric else ""

    head = "".join(f'<th scope="col"{kind(i)}>{_inline(h)}</th>' for i, h in enumerate(table.headers))
    rows = []
    for row in table.rows:
        cells = [f'<th scope="row">{_cell(row[0])}</th>']
        cells += [f"<td{kind(i)}>{_cell(cell)}</td>" for i, cell in enumerate(row[1:], 1)]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    label = escape(clean(table.caption).replace("**", "").replace("`", ""))
    html = (  # the caption is outside of the part that scrolls, so that it stays in view
        f'<div class="table"><p class="caption">{_inline(table.caption)}</p>'
        f'<div class="scroll" role="region" tabindex="0" aria-label="{label}"><table aria-label="{label}">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></div>"
    )
    return f"<details><summary>The numbers behind this figure</summary>{html}</details>" if table.folded else html


def _cell(cell: Cell | str) -> str:
    text = _inline(cell_text(cell))
    if isinstance(cell, str):
        return text
    if cell.color is not None:
        text = f'<span class="dot k{cell.color % NUM_COLORS}"></span>{text}'
    if cell.fraction is not None:
        bad = " bad" if cell.tone == "bad" else ""
        return f'{text}<span class="meter{bad}"><i style="width:{max(0.02, cell.fraction):.1%}"></i></span>'
    if cell.tone in ("good", "bad", "up", "down"):
        return f'<span class="chip {cell.tone}">{text}</span>'
    return f'<span class="dim">{text}</span>' if cell.tone == "quiet" else text


def _figure(figure: Figure) -> str:
    legend = _legend(figure.legend)
    if len(figure.drawings) == 1 and not figure.drawings[0].title:
        body = _drawing(figure.drawings[0])
    else:
        panels = "".join(
            f"<div{' class=full' if d.full else ''}><h4>{_inline(d.title)}</h4>{_drawing(d)}</div>"
            for d in figure.drawings
        )
        least = "380px" if figure.drawings[0].narrow else "270px"
        body = f'<div class="panels" style="--least:{least}">{panels}</div>'
    numbers = _table(figure.numbers) if figure.numbers else ""
    return (
        f"<figure><h3>{_inline(figure.title)}</h3>{legend}{body}"
        f"<figcaption>{_inline(figure.caption)}</figcaption>{numbers}</figure>"
    )


def _drawing(drawing: Drawing) -> str:
    if not drawing.narrow:
        return clean(drawing.wide)
    return clean(f'<div class="wide-only">{drawing.wide}</div><div class="narrow-only">{drawing.narrow}</div>')


def _legend(items: Sequence[LegendItem]) -> str:
    if not items:
        return ""
    if all(item.mark == "band" for item in items):
        patches = "".join(f'<li><i class="{heat_class(i.color)}"></i>{_inline(i.label)}</li>' for i in items)
        return f'<ul class="legend heat" aria-label="Multiples of the fair share">{patches}</ul>'
    return f'<ul class="legend">{"".join(map(_legend_item, items))}</ul>'


def _legend_item(item: LegendItem) -> str:
    color = f"c{item.color % NUM_COLORS}"
    if item.mark == "point":
        mark = f'<g class="ref points"><g>{marker(15, 7, item.color, 4.4)}</g></g>'
    elif item.mark == "change":
        mark = f'<g class="c{item.color % NUM_COLORS} mark"><path class="stroke" d="M15 0V14"/></g>'
    elif item.mark == "reference":
        mark = '<g class="ref reference"><path class="stroke" d="M1 7H29"/></g>'
    else:
        over = " over" if item.color >= NUM_COLORS else ""
        mark = f'<g class="{color} line{over}"><path class="stroke" d="M2 7H28"/><g>{marker(15, 7, item.color)}</g></g>'
    return f'<li><svg viewBox="0 0 30 14" aria-hidden="true">{mark}</svg>{_inline(item.label)}</li>'


def _sides(element: Sides) -> str:
    rows = []
    for heading, texts in element.rows:
        columns = "".join(
            f'<div><h4>{_inline(column)}</h4><pre dir="auto" tabindex="0">{escape(clean(text))}</pre></div>'
            for column, text in zip(element.columns, texts, strict=True)
        )
        prompt = f'<div class="prompt"><h4>Prompt</h4><pre dir="auto">{escape(clean(heading))}</pre></div>'
        rows.append(f'<div class="row">{prompt}<div class="two">{columns}</div></div>')
    return f'<div class="sides"><h3>{_inline(element.caption)}</h3>{"".join(rows)}</div>'


def _code(element: Code) -> str:
    html = (
        '<div class="copyable"><button type="button" class="copy" aria-live="polite" hidden>Copy</button>'
        f'<pre class="code" tabindex="0"><code>{escape(clean(element.text))}</code></pre></div>'
    )
    return f"<details><summary>{_inline(element.summary)}</summary>{html}</details>" if element.summary else html
