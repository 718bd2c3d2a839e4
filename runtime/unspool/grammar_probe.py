"""Reads a structured output on standard input and answers with a grammar that is safe to compile, or why there is none.

A program of its own, run as a file: compiling what users wrote can take all of a processor's time and memory, and
overflow the stack, within llguidance's own limits. Here that ends this process and no other. It imports no unspool:
that would take longer than its work.
"""

import json
import sys
import threading
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, regex_to_lark
from llguidance.gbnf_to_lark import any_to_lark

STACK_BYTES = 1 << 20
"""Far less than the threads of the process that will compile the same grammar have."""

WHITESPACE = r"[ \t\r\n]{0,40}"
"""Between a JSON text's parts: enough to indent it, not enough for a model to lose itself in."""


def llguidance_grammar(kind: str, value: Any) -> str:
    """The grammar in llguidance's own notation."""
    if kind == "regex":
        # Digits and letters of words are ASCII's, as in JSON schemas: other programs will read the text.
        return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(value, 'dw')}/")
    if kind == "choice":
        return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(choice) for choice in value))
    if kind == "grammar":
        return LLMatcher.grammar_from_lark(any_to_lark(value))
    schema = value if kind == "json_schema" else '{"type": "object"}'
    return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": WHITESPACE, "lenient": False})


def limit_resources(cpu_seconds: int, memory_bytes: int) -> None:
    """Has the system end this process when it takes more; only where systems can (not on Windows)."""
    try:
        import resource
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))


def answer(question: dict[str, Any]) -> dict[str, str]:
    """Compiles the grammar for a tokenizer of single bytes, and asks what a text may begin with."""
    try:
        grammar = llguidance_grammar(question["kind"], question["value"])
    except Exception as error:  # a converter of grammars: it can raise whatever a program can
        return {"error": str(error)}
    matcher = LLMatcher(LLTokenizer("byte"), grammar, log_level=0, limits=LLParserLimits(**question["limits"]))
    if not matcher.is_error():
        matcher.compute_bitmask()
    return {"error": matcher.get_error()} if matcher.is_error() else {"grammar": grammar}


def main() -> None:
    question = json.load(sys.stdin)
    limit_resources(question["cpu_seconds"], question["memory_bytes"])
    threading.stack_size(STACK_BYTES)
    worker = threading.Thread(target=lambda: json.dump(answer(question), sys.stdout))
    worker.start()
    worker.join()


if __name__ == "__main__":
    main()
