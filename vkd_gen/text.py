"""Text from users - names of folders, runs and data - as lines, Markdown, HTML and figures show it."""

import html


def printable(text: object) -> str:
    r"""Text that any file and terminal takes: what is not printable, such as a newline, is written as an escape.

    Names of folders may hold any bytes; Python hands those that are no UTF-8 on as lone surrogates, which no encoding
    takes.

    >>> printable("Bücher\n\udcfc")
    'Bücher\\n\\udcfc'
    """
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in str(text))


def one_line(error: BaseException) -> str:
    """The first line of what an error says, or else its name."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]


def reason(error: BaseException, length: int = 200) -> str:
    """What an error says, on one line and no longer than that, or else its name."""
    return " ".join(str(error).split())[:length] or type(error).__name__


def html_text(text: object) -> str:
    """Text inside of an HTML element."""
    return html.escape(printable(text))


def markdown_text(text: object) -> str:
    r"""Text inside of a line of Markdown, such as a table's cell: no markup, no formula, no HTML.

    >>> markdown_text("a|b <script> $x$")
    'a\\|b &lt;script&gt; \\$x\\$'
    """
    escaped = html.escape(printable(text).replace("\\", "\\\\"), quote=False)
    return "".join(f"\\{letter}" if letter in "|`*[]$" else letter for letter in escaped)


def figure_text(text: object) -> str:
    r"""Text in a figure of matplotlib, which reads dollars as formulas and leaves names with `_` first out of legends.

    >>> figure_text(r"_lr$\frac$")
    ' _lr\\$\\frac\\$'
    """
    escaped = printable(text).replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped
