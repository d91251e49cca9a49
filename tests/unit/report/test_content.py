"""Texts of any content stay texts, in Markdown as in HTML."""

import pytest
from markdown_it import MarkdownIt

from earthshine.report.content import (
    Bullets,
    Card,
    Cards,
    Cell,
    Code,
    Link,
    Links,
    Report,
    Section,
    Sides,
    Table,
    Text,
    clean,
    fence,
    markdown_element,
    percent_encoded,
    split_code,
    to_markdown,
)
from earthshine.report.markup import element_html, to_html
from earthshine.report.model_card import model_card


def test_controls_are_spelled_out():
    assert clean("a\0b\x1b[31m\u202ec\r\n\td") == "a⟨U+0000⟩b⟨U+001B⟩[31m⟨U+202E⟩c\n\td"
    assert clean("\ud800x").encode() == b"?x"


def test_a_lone_backtick_is_an_apostrophe():
    assert split_code("a `b` c` d") == ["a ", "b", " c' d"]


def test_a_fence_is_longer_than_what_it_holds():
    assert fence("a ```` b") == "`````\na ```` b\n`````"


def report(*elements):
    return Report("A <b>title</b> | x", "Lead", (Section("one", "One", "Section one", elements),))


def test_markdown():
    text = to_markdown(
        report(
            Text("1 < 2 & `x < y` [link](u)"),
            Text("absent", "absent"),
            Bullets((("**bold** item", "good"),)),
            Cards((Card("Loss", "2.0", "from 3.0"),)),
            Table("Caption", ("", "B"), (("a|b", Cell("1")),), frozenset({1})),
            Sides("run", ("Before", "After"), (("prompt\nof two lines", ("x", "```")),)),
            Code("ls", "sh", "Show"),
        )
    )
    lines = text.splitlines()
    assert lines[0] == "# A &lt;b&gt;title&lt;/b&gt; \\| x"
    assert "1 &lt; 2 &amp; `x < y` \\[link](u)" in lines
    assert "> absent" in lines
    assert "- **bold** item" in lines
    assert "|   | B |" in lines and "|---|---:|" in lines and "| a\\|b | 1 |" in lines
    assert "````\n```\n````" in text
    assert "Show\n\n```sh\nls\n```" in text


EVIL = [
    "```<img src=x onerror=alert(1)>`",
    "a`\n\n<img src=x onerror=alert(1)>\n\n`b",
    "`a``<img src=x onerror=alert(1)>``b`",
    "`a|<img src=x onerror=alert(1)>`",
    "`a\\|<img src=x onerror=alert(1)>`",
    "``` ``<img src=x onerror=alert(1)>",
    "~~~\r\r<img src=x onerror=alert(1)>",
    "\\`<img src=x onerror=alert(1)>\\`",
    "plain <img src=x onerror=alert(1)>",
    "<!-- `-->` <img src=x onerror=alert(1)>",
]


@pytest.mark.parametrize("evil", EVIL)
def test_no_text_of_a_run_becomes_live_html_in_markdown(evil):
    """markdown-it is a CommonMark parser, here with HTML let through as GitHub and the Hub do, and with tables."""
    elements = (
        Text(evil),
        Text(evil, "absent"),
        Bullets(((evil, ""),)),
        Cards((Card(evil, evil, evil, facts=((evil, evil),)),)),
        Table(evil, (evil, evil), ((evil, evil),)),
        Sides(evil, (evil,), ((evil, (evil,)),)),
        Links((Link(evil, percent_encoded(evil)),)),
        Code(evil, "", evil),
    )
    page = MarkdownIt("commonmark", {"html": True}).enable("table")
    card = model_card(
        {"name": evil, "base_model": evil, "limitations": [evil], "lineage": [evil], "data": [{"path": evil}]}
    )
    for text in (to_markdown(Report(evil, evil, (Section("a", evil, evil, elements),))), card):
        html = page.render(text)
        assert "<img" not in html and "<!--" not in html
        assert "img src=x onerror=alert(1)" in html.replace("\\", ""), "the text itself is still there"


def test_html_escapes_every_kind_of_block():
    evil = '<img src=x onerror="alert(1)">&'
    elements = (
        Text(evil),
        Bullets(((evil, ""),)),
        Cards((Card(evil, evil, evil, facts=((evil, evil),)),)),
        Table(evil, (evil,), ((evil,),)),
        Sides(evil, (evil,), ((evil, (evil,)),)),
        Links((Link(evil, percent_encoded(evil)),)),
        Code(evil, evil, evil),
    )
    page = to_html(Report(evil, evil, (Section("a", evil, evil, elements),)))
    assert "<img" not in page
    assert page.count("&lt;img src=x onerror=&quot;alert(1)&quot;&gt;&amp;") >= 17


def test_a_table_is_labelled_and_its_bar_is_drawn():
    html = element_html(
        Table("Cap **t**", ("", "B"), ((Cell("r", color=1), Cell("50 %", fraction=0.5)),), frozenset({1}))
    )
    assert 'aria-label="Cap t"' in html and "<strong>t</strong>" in html
    assert '<th scope="row"><span class="dot k1"></span>r</th>' in html
    assert '<td class="num">50 %<span class="meter"><i style="width:50.0%"></i></span></td>' in html


def test_a_link_s_text_cannot_end_it():
    evil = "a](javascript:alert(1)) `]` [b"
    html = MarkdownIt("commonmark").render(markdown_element(Links((Link(evil, percent_encoded("javascript:x y")),))))
    assert html.count("<a ") == 1 and '<a href="javascript%3Ax%20y">' in html
