"""The form of DeepSeek-R1-Zero's template: a thought, </think>, something after it; any <answer> tag whole and alone.

The template ends with <think>, so that a response may open the thought once more but need not. For use in a sum:
``verifier: 0.9*math + 0.1*format``.
"""

from __future__ import annotations

import re
from typing import Any

from megatron_rlvr.verdict import Verdict
from megatron_rlvr.verifiers.answer_text import strip_marks

ISOLATED = False  # text alone

_TAGS = re.compile(r"</?(?:think|answer)>")
_ORDERS = (["</think>"], ["</think>", "<answer>", "</answer>"])


def read_answer(value: Any) -> None:
    """Any answer will do: the form is the same for all."""


def verify(response: str, answer: None) -> Verdict:
    """Reward 1 for the form, else 0."""
    tags, texts = _TAGS.findall(response), [strip_marks(text) for text in _TAGS.split(response)]
    if tags[:1] == ["<think>"] and not texts[0]:
        tags, texts = tags[1:], texts[1:]
    if tags not in _ORDERS:
        return Verdict(0.0, "ok", message="the tags are not <think> thought </think> <answer> answer </answer>")
    thought, *after = texts
    # With an <answer> tag the answer is in it, and nothing but space or an end-of-text token around it.
    filled = bool(after[0]) if len(tags) == 1 else bool(after[1]) and not after[0] and not after[2]
    return Verdict(float(bool(thought) and filled), "ok", message="" if thought and filled else "an empty part")
