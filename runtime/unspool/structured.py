"""From what a request wants its text to look like to constraints on its tokens. Knows the tokenizer, no model."""

import copy
import json
import re
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from transformers import PreTrainedTokenizerBase

from unspool import grammar_probe
from unspool.constraint import Constraint
from unspool.errors import UserError
from unspool.requests import StructuredOutput

MAX_COMPILED = 64
"""Grammars that are kept for the next request, each of some megabytes at most; refused ones are remembered too."""
MAX_PROBES = 2
"""Compilations at a time: others wait."""
PROBE_CPU_SECONDS = 2
PROBE_SECONDS = 20
"""Of the clock: far more than the processor time, which is what counts on a busy machine."""
PROBE_MEMORY_BYTES = 1 << 30

LIMITS: dict[str, Any] = {
    "step_lexer_fuel": 200_000,  # for one token some 15 ms at most
    "step_max_items": 50_000,
    "max_items_in_row": 1000,  # an ambiguous grammar's work for one token grows with its square: some 25 ms here
    "initial_lexer_fuel": 1_000_000,
    "max_grammar_size": 500_000,
    "max_lexer_states": 20_000,  # of 1 to 2 kB each: what one request's memory may grow by
    "verbose_errors": False,
}

KEYWORDS = frozenset(
    [
        "$dynamicRef",
        "contains",
        "dependentRequired",
        "dependentSchemas",
        "dependencies",
        "else",
        "format",
        "if",
        "maxContains",
        "maxProperties",
        "minContains",
        "not",
        "oneOf",
        "patternProperties",
        "propertyNames",
        "then",
        "unevaluatedItems",
        "unevaluatedProperties",
        "uniqueItems",
    ]
)
"""What a schema may ask for and not get: only these are repeated in an error message."""


class GrammarCompiler:
    """Compiles structured outputs for one tokenizer. Thread-safe; call it where waiting for seconds is no harm.

    `eos_ids` end a text, wherever its grammar lets it end.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_ids: Iterable[int]) -> None:
        self._source = tokenizer
        self._eos_ids = sorted(eos_ids)
        self._tokenizer: LLTokenizer | None = None
        self._lock = threading.Lock()
        self._probes = threading.BoundedSemaphore(MAX_PROBES)
        self._compiled: OrderedDict[StructuredOutput, LLMatcher | str] = OrderedDict()

    def compile(self, structured: StructuredOutput) -> Constraint:
        """A constraint at the beginning of the text.

        Raises InvalidRequest when the structure is not valid, uses what cannot be enforced, can never be met, or takes
        too much time or memory; UserError when the tokenizer's tokens have no known bytes.
        """
        tokenizer = self._byte_tokenizer()
        with self._lock:
            result = self._compiled.get(structured)
        if result is None:
            with self._probes:
                result = _compile(structured, tokenizer)
        with self._lock:
            self._compiled[structured] = result
            self._compiled.move_to_end(structured)
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        if isinstance(result, str):
            raise structured.refused(result)
        return Constraint(result.deep_copy(), tokenizer.vocab_size)

    def _byte_tokenizer(self) -> LLTokenizer:
        """The tokenizer as llguidance knows it; making it takes a second for a large vocabulary."""
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = _byte_tokenizer(self._source, self._eos_ids)
            return self._tokenizer


def _byte_tokenizer(source: PreTrainedTokenizerBase, eos_ids: list[int]) -> LLTokenizer:
    backend = getattr(source, "backend_tokenizer", None)
    if backend is None:
        raise UserError("structured output needs a fast tokenizer: add a tokenizer.json to the model")
    backend = copy.copy(backend)
    backend.no_padding()
    backend.no_truncation()
    description = json.loads(backend.to_str())
    decoder = description["decoder"] or {}
    if decoder.get("type") == "Metaspace":
        # llguidance knows this decoder's parts only. That it drops the text's first space is the text stream's affair.
        space = {"type": "Replace", "pattern": {"String": decoder["replacement"]}, "content": " "}
        description["decoder"] = {"type": "Sequence", "decoders": [space, {"type": "ByteFallback"}, {"type": "Fuse"}]}
    try:
        return LLTokenizer(json.dumps(description), eos_token=eos_ids or source.eos_token_id)
    except ValueError as error:
        raise UserError(f"structured output cannot be had with this model's tokenizer: {error}") from error


def _compile(structured: StructuredOutput, tokenizer: LLTokenizer) -> LLMatcher | str:
    """The matcher, or why there is none."""
    verdict = _probe(structured)
    if "grammar" not in verdict:
        return _reason(structured, verdict["error"])
    matcher = LLMatcher(tokenizer, verdict["grammar"], log_level=0, limits=LLParserLimits(**LIMITS))
    if not matcher.is_error():
        matcher.compute_bitmask()
    return _reason(structured, matcher.get_error()) if matcher.is_error() else matcher


def _probe(structured: StructuredOutput) -> dict[str, str]:
    """What `grammar_probe` answers.

    llguidance's limits do not cover all of its work (a large multipleOf, patterns under an allOf, a long chain of
    rules), so whether it can be trusted with a grammar is tried where that harms nothing.
    """
    question = {
        "kind": structured.kind,
        "value": structured.value,
        "limits": LIMITS,
        "cpu_seconds": PROBE_CPU_SECONDS,
        "memory_bytes": PROBE_MEMORY_BYTES,
    }
    # -P: the program's folder has modules whose names others use.
    program = [sys.executable, "-P", str(Path(grammar_probe.__file__))]
    try:
        process = subprocess.run(
            program, input=json.dumps(question).encode(), capture_output=True, timeout=PROBE_SECONDS
        )
    except subprocess.TimeoutExpired:
        return {"error": "too complex"}
    if process.returncode != 0 or not process.stdout:
        return {"error": "too complex"}
    verdict: dict[str, str] = json.loads(process.stdout)
    return verdict


def _reason(structured: StructuredOutput, error: str) -> str:
    """A message for the user that repeats nothing of the structure, which the library's own does."""
    if re.search(r"too (complex|big|large|many|deep)|limit|max is", error):
        return f"the {structured.kind} is too complex: it takes too much time or memory"
    if re.search("[Uu]nsatisfiable|NoExtension", error):
        return f"no text can meet the {structured.kind}"
    refused = re.search(r"Unimplemented keys: \[.*?\]|^oneOf", error)
    if refused and (keywords := sorted(KEYWORDS & set(re.findall(r"\$?\w+", refused[0])))):
        return f"the {structured.kind} cannot be enforced: it uses {', '.join(keywords)}"
    if structured.kind == "regex":
        return (
            "the regex is not valid, or uses look-around, back-references or word boundaries, which are not supported"
        )
    if structured.kind == "json_schema":
        return "the json_schema is not valid, or uses what is not supported (remote references, an unknown format)"
    return f"the {structured.kind} is not valid"
