"""HTML as plain text: whatever is not made by `element` is escaped on its way into a page."""

import base64
import hashlib
import html
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from supmim_jax.report.style import CSS

BARRED = ("Cc", "Cs")  # categories of Unicode
VOID = ("img", "link", "meta", "col", "br")


class Markup(str):
    """Text that is HTML already. Adding or formatting it gives a plain string, escaped again."""

    __slots__ = ()


def element(tag: str, /, *children: str, **attributes: str | int) -> Markup:
    """An element; children are escaped unless they are Markup, attributes always are.

    Underscores in names of attributes become hyphens, and class_ is class.
    """
    pairs = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escaped(str(value))}"'
        for key, value in attributes.items()
    )
    if tag in VOID:
        return Markup(f"<{tag}{pairs}>")
    return Markup(f"<{tag}{pairs}>{join(*children)}</{tag}>")


def escaped(text: str) -> str:
    """Text without a meaning in HTML; controls and half characters, which it lacks, as �."""
    kept = (c if c in "\t\n" or unicodedata.category(c) not in BARRED else "�" for c in text)
    return html.escape("".join(kept))


def join(*children: str) -> Markup:
    """Children one after the other, escaped unless they are Markup."""
    return Markup("".join(x if isinstance(x, Markup) else escaped(x) for x in children))


class Section(NamedTuple):
    """A part of the page that its contents list leads to."""

    title: str
    anchor: str
    content: Markup


def section(title: str, anchor: str, *children: str) -> Section:
    heading = element("h2", title, id=f"{anchor}-title")
    content = element("section", heading, *children, id=anchor, aria_labelledby=f"{anchor}-title")
    return Section(title, anchor, content)


def contents(sections: Sequence[Section]) -> Markup:
    """Links to the sections."""
    links = (element("a", one.title, href=f"#{one.anchor}") for one in sections)
    entries = element("ul", *(element("li", link) for link in links))
    return element("nav", entries, aria_label="Sections")


def note(text: str) -> Markup:
    return element("p", text, class_="note")


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], **attributes) -> Markup:
    """A table whose first column names its rows; it scrolls by itself where it is too wide."""
    top = element("thead", element("tr", *(element("th", x, scope="col") for x in head)))
    body = element(
        "tbody",
        *(
            element("tr", element("th", row[0], scope="row"), *(element("td", x) for x in row[1:]))
            for row in rows
        ),
    )
    inner = element("table", element("caption", caption), top, body, **attributes)
    return element("div", inner, class_="scroll", role="region", aria_label=caption, tabindex=0)


def page(title: str, *children: str) -> str:
    """The whole document. Its policy allows this one style sheet and images inside the page."""
    digest = base64.b64encode(hashlib.sha256(CSS.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; "
        "form-action 'none'"
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("link", rel="icon", href="data:,"),
        element("title", title),
        element("style", Markup(CSS)),
    )
    body = element("body", element("main", *children))
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"
