"""Pieces of a static page: text without markup, a table that scrolls, a picture inside the file."""

from __future__ import annotations

import base64
import html
import io
from typing import Any

from ..errors import plain_text


def page_text(value: Any) -> str:
    """Return a name or a value as text of a page: no markup, no escape codes, no turned direction."""
    return html.escape(plain_text(value))


def wide(table: str) -> str:
    """Return a table that scrolls by itself where the page is too narrow for it."""
    return f'<div class="wide">{table}</div>'


def picture(figure: Any, alt: str) -> str:
    """Return a matplotlib figure as an image of the page.

    Args:
        figure: drawn here.
        alt: what it shows, in words.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
