"""One HTML page that needs no network and no other file, and in which text of the model's stays text.

A page may hold one script of ours. Its hash is the only one that the page's policy lets run, so that nothing the model
writes can, however it is put; data travels as JSON beside it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from html import escape
from pathlib import Path
from typing import Any

LONGEST = 4000  # characters of a text that is shown in full

# Control characters are not allowed in HTML: each shows as its own picture (␀, ␛), as far as Unicode has one.
_PICTURES = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n"} | {0x7F: "␡"}
# Marks that turn the direction of all text behind them show as their number, and so do the C1 controls.
_MARKS = [*range(0x80, 0xA0), 0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_VISIBLE = _PICTURES | {code: f"‹U+{code:04X}›" for code in _MARKS}


def visible(value: Any) -> str:
    """The value as text in which every control and direction mark can be seen and does nothing."""
    return str(value).translate(_VISIBLE)


def text(value: Any) -> str:
    """Text made safe for HTML, inside an element or a quoted attribute."""
    return escape(visible(value), quote=True)


def plain(value: Any) -> str:
    """Text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def pre(value: Any) -> str:
    """Text with its line breaks, cut at LONGEST; the keyboard stops only where it may have to scroll."""
    whole = plain(value)
    shown = whole if len(whole) <= LONGEST else f"{whole[:LONGEST]} … {len(whole) - LONGEST:,} more characters"
    stop = ' tabindex="0"' if len(whole) > 400 or whole.count("\n") > 9 else ""
    return f"<pre{stop}>{text(shown)}</pre>"


def data(identity: str, value: Any) -> str:
    """JSON for the page's script, which finds it by its id; ``<`` is written as an escape, so no tag can end it."""
    block = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json" id="{identity}">{block}</script>'


def document(title: str, body: str, style: str, script: str = "") -> str:
    """The whole page; ``title`` is text, ``body`` HTML."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    runs = f" script-src 'sha256-{digest}';" if script else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none';{runs} style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{text(title)}</title>
<style>{style}</style>
</head>
<body>
{body}
{f"<script>{script}</script>" if script else ""}
</body>
</html>
"""


def write(path: Path, page: str) -> Path:
    """Put the page in its place in one move: a reader never meets half of it. Returns the path."""
    draft = path.with_name(f"{path.name}.new")
    draft.write_text(page, encoding="utf-8", errors="backslashreplace")
    os.replace(draft, path)
    return path
