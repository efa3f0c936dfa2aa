"""The prompt templates of the papers, word for word, for a model learns the words.

wrap("r1_zero", "What is 1+1?") -> "A conversation between User and Assistant. ... <think>"
"""

from __future__ import annotations

import re

# DeepSeek-R1 (arXiv 2501.12948) Table 1, as the Lp-Reg recipes close it (github.com/CarlanLark/Lp-Reg-dev,
# verl/utils/dataset/rl_dataset.py:79): the model goes on behind <think>.
R1_ZERO = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant "
    "first thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning "
    "process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., <think> "
    "reasoning process here </think> <answer> answer here </answer>. User: {prompt}.\n"
    "Assistant: Let me solve this step by step.\n<think>"
)

# DAPO (arXiv 2503.14476), the wrapper of its data sets; a user message of the model's own chat template. CDE takes it.
DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n{prompt}\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)

# Qwen's own request for a boxed answer, at the end of the user message, as Qwen2-Math is evaluated
# (github.com/QwenLM/Qwen2.5-Math, evaluation/utils.py, "qwen-boxed"; the README has the sentence in a system message).
BOXED = "{prompt}\nPlease reason step by step, and put your final answer within \\boxed{}."

TEMPLATES = {"r1_zero": R1_ZERO, "dapo": DAPO, "boxed": BOXED}
# How questions end in data sets that ask for an answer already: verl's MATH and GSM8K
# (github.com/volcengine/verl, examples/data_preprocess), and Qwen's sentence on the question's own line.
_ENDINGS = (
    " Let's think step by step and output the final answer within \\boxed{}.",
    ' Let\'s think step by step and output the final answer after "####".',
    " Please reason step by step, and put your final answer within \\boxed{}.",
)
_WRAPPERS = (*TEMPLATES.values(), *("{prompt}" + ending for ending in _ENDINGS))
INSIDE_CHAT = ("dapo", "boxed")  # user messages; r1_zero is a whole prompt
CHAT = ("chat", *INSIDE_CHAT)  # what the tokenizer's chat template renders

# Marks of a turn in the chat templates of Qwen, DeepSeek, Llama 3, Llama 2 and Gemma, loosely: data sets misspell them.
_TURN = re.compile(
    r"<[|｜]\s*(?:im_start|im_end|start_header_id|end_header_id|eot_id|user|assistant|system)\s*[|｜]>"
    r"|\[/?INST\]|<(?:start|end)_of_turn>",
    re.IGNORECASE,
)


def wrap(name: str, text: str) -> str:
    """The question in the template ``name``; one that came wrapped in a template is taken out of that first."""
    return TEMPLATES[name].replace("{prompt}", unwrap(text))


def unwrap(text: str) -> str:
    """The question inside a known template or in front of a data set's usual ending, or the text as it is."""
    for template in _WRAPPERS:
        before, after = template.split("{prompt}")
        if text.startswith(before) and text.endswith(after):
            return text[len(before) : len(text) - len(after)]
    return text


def turn_mark(text: str) -> str:
    """The first mark of a chat template's turn in the text: it has been rendered already. "" where there is none."""
    found = _TURN.search(text)
    return found.group() if found else ""
