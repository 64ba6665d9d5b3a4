"""Twenty short Python functions to complete, each with asserts: a model's greedy completions are run.

The tasks are written for this benchmark, in the form of HumanEval: a signature and a docstring, and tests that the
model does not see. Completions run in a process of their own, with a limit on time and memory, in an empty folder.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

NEW_TOKENS = 80
SECONDS = 10
BYTES = 2**30


@dataclass(frozen=True)
class CodingTask:
    """A function to complete.

    Attributes:
        signature: First line of the function.
        docstring: Its docstring.
        tests: Statements that raise an AssertionError where it is wrong.
    """

    signature: str
    docstring: str
    tests: str

    @property
    def prompt(self) -> str:
        return f'{self.signature}\n    """{self.docstring}"""\n'


TASKS = (
    CodingTask(
        "def count_vowels(text: str) -> int:",
        "Return the number of vowels (a, e, i, o, u, in either case) in text.",
        "assert count_vowels('Hello World') == 3; assert count_vowels('') == 0; assert count_vowels('AEIOUxyz') == 5",
    ),
    CodingTask(
        "def is_palindrome(text: str) -> bool:",
        "Return True if text reads the same backwards, ignoring case.",
        "assert is_palindrome('Level'); assert not is_palindrome('python'); assert is_palindrome('')",
    ),
    CodingTask(
        "def factorial(n: int) -> int:",
        "Return n! for n >= 0.",
        "assert factorial(0) == 1; assert factorial(5) == 120; assert factorial(10) == 3628800",
    ),
    CodingTask(
        "def fibonacci(n: int) -> int:",
        "Return the n-th Fibonacci number, with fibonacci(0) == 0 and fibonacci(1) == 1.",
        "assert [fibonacci(i) for i in range(8)] == [0, 1, 1, 2, 3, 5, 8, 13]",
    ),
    CodingTask(
        "def greatest_common_divisor(a: int, b: int) -> int:",
        "Return the greatest common divisor of two positive integers.",
        "assert greatest_common_divisor(12, 18) == 6; assert greatest_common_divisor(7, 13) == 1",
    ),
    CodingTask(
        "def is_prime(n: int) -> bool:",
        "Return True if n is a prime number.",
        "assert [n for n in range(20) if is_prime(n)] == [2, 3, 5, 7, 11, 13, 17, 19]",
    ),
    CodingTask(
        "def flatten(lists: list) -> list:",
        "Join a list of lists into one list.",
        "assert flatten([[1, 2], [], [3]]) == [1, 2, 3]; assert flatten([]) == []",
    ),
    CodingTask(
        "def unique(values: list) -> list:",
        "Remove duplicates from a list, keeping the first occurrence of each value in order.",
        "assert unique([3, 1, 3, 2, 1]) == [3, 1, 2]; assert unique([]) == []",
    ),
    CodingTask(
        "def word_counts(text: str) -> dict:",
        "Return a dict from each word in text (split at whitespace) to the number of its occurrences.",
        "assert word_counts('a b a') == {'a': 2, 'b': 1}; assert word_counts('') == {}",
    ),
    CodingTask(
        "def second_largest(values: list) -> int:",
        "Return the second largest of the distinct values in a list.",
        "assert second_largest([4, 1, 9, 7]) == 7; assert second_largest([5, 5, 3]) == 3",
    ),
    CodingTask(
        "def sum_of_digits(n: int) -> int:",
        "Return the sum of the decimal digits of a non-negative integer.",
        "assert sum_of_digits(0) == 0; assert sum_of_digits(90210) == 12",
    ),
    CodingTask(
        "def transpose(matrix: list) -> list:",
        "Transpose a matrix given as a list of rows; the result is a list of lists.",
        "assert transpose([[1, 2, 3], [4, 5, 6]]) == [[1, 4], [2, 5], [3, 6]]",
    ),
    CodingTask(
        "def binary_search(values: list, target: int) -> int:",
        "Return the index of target in a sorted list, or -1 if it is not there.",
        "assert binary_search([1, 3, 5, 7], 5) == 2; assert binary_search([1, 3], 2) == -1; "
        "assert binary_search([], 1) == -1",
    ),
    CodingTask(
        "def to_binary(n: int) -> str:",
        "Return the binary digits of a non-negative integer, without a prefix.",
        "assert to_binary(0) == '0'; assert to_binary(10) == '1010'",
    ),
    CodingTask(
        "def balanced(text: str) -> bool:",
        "Return True if the parentheses ( and ) in text are balanced.",
        "assert balanced('(a(b))'); assert not balanced(')('); assert not balanced('(()'); assert balanced('')",
    ),
    CodingTask(
        "def title_case(text: str) -> str:",
        "Capitalize the first letter of every word; words are separated by single spaces.",
        "assert title_case('hello big world') == 'Hello Big World'",
    ),
    CodingTask(
        "def running_maximum(values: list) -> list:",
        "Return a list whose i-th element is the largest of the first i + 1 values.",
        "assert running_maximum([1, 3, 2, 5]) == [1, 3, 3, 5]; assert running_maximum([]) == []",
    ),
    CodingTask(
        "def chunks(values: list, size: int) -> list:",
        "Split a list into consecutive lists of the given size; the last one may be shorter.",
        "assert chunks([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4], [5]]; assert chunks([], 3) == []",
    ),
    CodingTask(
        "def invert(mapping: dict) -> dict:",
        "Exchange keys and values of a dict.",
        "assert invert({'a': 1, 'b': 2}) == {1: 'a', 2: 'b'}",
    ),
    CodingTask(
        "def merge_sorted(a: list, b: list) -> list:",
        "Merge two sorted lists into one sorted list.",
        "assert merge_sorted([1, 4], [2, 3, 5]) == [1, 2, 3, 4, 5]; assert merge_sorted([], [1]) == [1]",
    ),
)


def complete(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], new_tokens: int
) -> list[str]:
    """Greedy continuations of prompts, without the prompts, computed as one left-padded batch."""
    end = tokenizer.eos_token_id
    rows = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    length = max(map(len, rows))
    ids = torch.tensor([[end] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    greedy = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=end, pad_token_id=end)
    output = model.generate(ids, attention_mask=mask, generation_config=greedy)
    return tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)


def body(completion: str) -> str:
    """The part of a completion that belongs to the function: up to the first line that is not indented."""
    lines = completion.split("\n")
    end = next((i for i, line in enumerate(lines) if line.strip() and not line.startswith((" ", "\t"))), len(lines))
    return "\n".join(lines[:end])


def passes(task: CodingTask, completion: str) -> bool:
    """True if the completed function passes its tests."""
    program = f"{task.prompt}{body(completion)}\n{task.tests}\n"
    with tempfile.TemporaryDirectory() as folder:
        try:
            run = subprocess.run(
                [sys.executable, "-I", "-c", program],
                cwd=folder,
                capture_output=True,
                timeout=SECONDS,
                preexec_fn=_limit,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
    return run.returncode == 0


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
