import json
import re
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from unspool import structured as structured_module
from unspool.constraint import Constraint, ConstraintFailed
from unspool.errors import UserError
from unspool.requests import (
    MAX_CHOICE_CHARACTERS,
    MAX_CHOICES,
    MAX_GRAMMAR_BYTES,
    MAX_REGEX_BYTES,
    MAX_SCHEMA_BYTES,
    MAX_SCHEMA_NESTING,
    InvalidRequest,
    SamplingParams,
    StructuredOutput,
)
from unspool.sampling import Sampler
from unspool.structured import MAX_COMPILED, GrammarCompiler

PADDING = 7
"""Rows of a model's logits beyond its tokenizer's vocabulary."""

WITH_ALL_BYTES = ["byte_level_tokenizer", "byte_fallback_tokenizer"]
TOKENIZERS = [*WITH_ALL_BYTES, "metaspace_tokenizer"]


class Writer:
    """A tokenizer, its compiler, and a model of random logits."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.eos = tokenizer.eos_token_id
        self.compiler = GrammarCompiler(tokenizer, {self.eos})
        self.vocab_size = len(tokenizer) + PADDING
        closing = {self.eos, *(token for token in range(len(tokenizer)) if set(self.bytes_of(token)) & set(b'"]}'))}
        self.closing = sorted(closing)

    def bytes_of(self, token: int) -> bytes:
        """What a token spells; nothing for a special one."""
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if token in self.tokenizer.all_special_ids:
            return b""
        if byte := re.fullmatch("<0x(..)>", piece):
            return bytes([int(byte[1], 16)])
        letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
        if self.tokenizer.get_vocab().get("Ġ") is not None:
            return bytes(letters[letter] for letter in piece)
        return bytes(piece.replace("\u2581", " ").encode())

    def write(
        self, constraint: Constraint, seed: int = 0, max_tokens: int = 4000, params: SamplingParams | None = None
    ) -> list[int]:
        """Tokens until the constraint is finished; what closes a text is likelier than the rest, to come to an end."""
        random = torch.Generator().manual_seed(seed)
        sampler = Sampler(
            params or SamplingParams(seed=seed),
            (),
            self.vocab_size,
            stop_ids=frozenset({self.eos}),
            constraint=constraint,
        )
        tokens: list[int] = []
        while not sampler.finished and len(tokens) < max_tokens:
            logits = torch.randn(self.vocab_size, generator=random)
            logits[self.closing] += 5.0
            tokens.append(sampler.sample(logits))
        assert sampler.finished
        return tokens

    def text(self, tokens: list[int]) -> str:
        text = self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


@pytest.fixture(scope="module")
def byte_level(byte_level_tokenizer: PreTrainedTokenizerFast) -> Writer:
    return Writer(byte_level_tokenizer)


@pytest.fixture(scope="module")
def writers(request: pytest.FixtureRequest) -> dict[str, Writer]:
    return {name: Writer(request.getfixturevalue(name)) for name in TOKENIZERS}


def schema_output(schema: Any) -> StructuredOutput:
    return StructuredOutput(kind="json_schema", value=json.dumps(schema))


names = st.text('abcé "\\{}', min_size=1, max_size=5)
leaves = st.one_of(
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": "number"}, {"type": "string", "format": "date"}]),
    st.tuples(st.integers(-999, 0), st.integers(0, 999)).map(
        lambda bounds: {"type": "integer", "minimum": bounds[0], "maximum": bounds[1]}
    ),
    st.integers(0, 6).map(lambda size: {"type": "string", "minLength": size, "maxLength": size + 3}),
    st.lists(st.one_of(st.text(max_size=4), st.integers(-9, 9), st.none()), min_size=1, max_size=4).map(
        lambda values: {"enum": values}
    ),
    st.sampled_from(["^[a-f]{2,4}$", "^(é|😀)+$", "[^!]"]).map(lambda pattern: {"type": "string", "pattern": pattern}),
)


def containers(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    objects = st.dictionaries(names, inner, max_size=3).flatmap(
        lambda properties: st.sets(st.sampled_from(sorted(properties)) if properties else st.nothing()).map(
            lambda required: {
                "type": "object",
                "properties": properties,
                "required": sorted(required),
                "additionalProperties": False,
            }
        )
    )
    arrays = st.tuples(inner, st.integers(0, 2)).map(
        lambda parts: {"type": "array", "items": parts[0], "minItems": parts[1], "maxItems": parts[1] + 1}
    )
    return st.one_of(objects, arrays, st.lists(inner, min_size=1, max_size=3).map(lambda options: {"anyOf": options}))


schemas = st.recursive(leaves, containers, max_leaves=5)


@pytest.mark.parametrize("name", WITH_ALL_BYTES)
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schema=schemas, seed=st.integers(0, 1000))
def test_any_sampled_text_meets_the_schema(
    writers: dict[str, Writer], name: str, schema: dict[str, Any], seed: int
) -> None:
    writer = writers[name]
    text = writer.text(writer.write(writer.compiler.compile(schema_output(schema)), seed))
    jsonschema.Draft202012Validator(schema).validate(json.loads(text))


@pytest.mark.parametrize("name", WITH_ALL_BYTES)
@pytest.mark.parametrize("seed", range(5))
def test_any_json_object_will_do_without_a_schema(writers: dict[str, Writer], name: str, seed: int) -> None:
    writer = writers[name]
    text = writer.text(writer.write(writer.compiler.compile(StructuredOutput(kind="json_object")), seed))
    assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize("name", WITH_ALL_BYTES)
@pytest.mark.parametrize(
    "pattern",
    [
        r"[a-c]{2,5}",
        r"(foo|bar)+x?",
        r"[\d]{3}-\d{4}/\w",
        r"^a$",
        r"(a+)+$",
        r"é+[☃😀]{1,3}",
        r"(?i)yes|no",
        r"[^\n]{0,4}",
        "a*?b",
    ],
)
def test_any_sampled_text_matches_the_regular_expression(writers: dict[str, Writer], name: str, pattern: str) -> None:
    writer = writers[name]
    constraint = writer.compiler.compile(StructuredOutput(kind="regex", value=pattern))
    for seed in range(4):
        text = writer.text(writer.write(constraint.fork(), seed))
        assert re.fullmatch(pattern, text), text


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        ('start: "(" start ")" | /[0-9]/ ', r"\(*[0-9]\)*"),
        ('start: word ("," word)*\nword: WORD\nWORD: /[a-z]{1,3}/', r"[a-z]{1,3}(,[a-z]{1,3})*"),
        ('root ::= "yes" | "no" ws\nws ::= [!?]{1,2}', r"yes|no[!?]{1,2}"),
    ],
)
def test_grammars_are_written_as_larks_or_as_llama_cpps(byte_level: Writer, grammar: str, pattern: str) -> None:
    constraint = byte_level.compiler.compile(StructuredOutput(kind="grammar", value=grammar))
    for seed in range(4):
        text = byte_level.text(byte_level.write(constraint.fork(), seed))
        assert re.fullmatch(pattern, text)
        assert text.count("(") == text.count(")")


CHOICES = ("the weaver", "the weaver said", "never", "that")
ODD_CHOICES = ("é😀", 'a"b\\\n', "<|end|>", "e\u0301", "never")


@pytest.mark.parametrize(
    ("name", "choices"),
    [*((name, CHOICES) for name in TOKENIZERS), *((name, ODD_CHOICES) for name in WITH_ALL_BYTES)],
)
def test_every_choice_can_be_written_and_nothing_else(
    writers: dict[str, Writer], name: str, choices: tuple[str, ...]
) -> None:
    writer = writers[name]
    constraint = writer.compiler.compile(StructuredOutput(kind="choice", value=choices))
    written = {writer.text(writer.write(constraint.fork(), seed)) for seed in range(60)}
    assert written == set(choices)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_mask_is_what_trying_every_token_finds(writers: dict[str, Writer], name: str) -> None:
    """A token may come when some choice begins with the text and it; the end, when the text is a choice.

    Where only one byte can follow, the mask may be a single one of those tokens: the tokenizer's own spelling.
    """
    writer = writers[name]
    texts = CHOICES if name == "metaspace_tokenizer" else CHOICES + ODD_CHOICES
    choices = [choice.encode() for choice in texts]
    spelled = [writer.bytes_of(token) for token in range(len(writer.tokenizer))]
    constraint = writer.compiler.compile(StructuredOutput(kind="choice", value=texts))
    random = np.random.default_rng(0)
    for _ in range(30):
        place, text = constraint.fork(), b""
        while not place.finished:
            possible = [bool(piece) and any(choice.startswith(text + piece) for choice in choices) for piece in spelled]
            possible[writer.eos] = text in choices
            allowed = place.allowed().tolist()
            following = {choice[len(text) :][:1] for choice in choices if choice.startswith(text)}
            if len(following) == 1 and sum(allowed) == 1:
                assert possible[allowed.index(True)]
            else:
                assert allowed == possible
            assert place.complete == (text in choices)
            token = int(random.choice(np.flatnonzero(possible)))
            place.accept(token)
            text += spelled[token]
        assert text in choices


def test_tokens_beyond_the_tokenizer_are_never_allowed(byte_level: Writer) -> None:
    constraint = byte_level.compiler.compile(StructuredOutput(kind="regex", value="(.|\n)*"))
    scores = np.zeros(byte_level.vocab_size, dtype=np.float32)
    constraint.mask(scores)
    assert np.isneginf(scores[-PADDING:]).all()
    assert np.isfinite(scores[byte_level.eos])
    narrow = np.zeros(50, dtype=np.float32)
    constraint.mask(narrow)
    assert np.isfinite(narrow[10:]).all()


def test_the_end_is_forced_where_nothing_else_can_follow(byte_level: Writer) -> None:
    """Greedy choice of an unlikely end: only the constraint can have chosen it."""
    constraint = byte_level.compiler.compile(StructuredOutput(kind="regex", value="(ab)?"))
    logits = torch.zeros(byte_level.vocab_size)
    logits[byte_level.eos] = -100.0
    sampler = Sampler(SamplingParams(temperature=0), (), byte_level.vocab_size, constraint=constraint)
    tokens = []
    while not sampler.finished:
        tokens.append(sampler.sample(logits))
    assert byte_level.text(tokens) == "ab"
    ended = byte_level.compiler.compile(StructuredOutput(kind="regex", value="(ab)*"))
    ended.accept(byte_level.eos)
    assert ended.finished
    with pytest.raises(ConstraintFailed, match="complete"):
        ended.accept(tokens[0])


def test_greedy_choice_is_the_best_allowed_token(byte_level: Writer) -> None:
    constraint = byte_level.compiler.compile(StructuredOutput(kind="regex", value="[xyz]{3}"))
    logits = torch.randn(byte_level.vocab_size, generator=torch.Generator().manual_seed(3))
    allowed = constraint.allowed()
    best = max(np.flatnonzero(allowed), key=lambda token: float(logits[token]))
    sampler = Sampler(SamplingParams(temperature=0), (), byte_level.vocab_size, constraint=constraint)
    assert sampler.sample(logits) == best


def test_the_least_number_of_tokens_holds_off_the_end_as_long_as_the_text_can_go_on(byte_level: Writer) -> None:
    params = SamplingParams(min_tokens=12, temperature=0)
    open_ended = byte_level.compiler.compile(StructuredOutput(kind="regex", value="a*"))
    assert len(byte_level.write(open_ended, params=params)) >= 13
    bounded = byte_level.compiler.compile(StructuredOutput(kind="choice", value=("a", "ab")))
    assert byte_level.text(byte_level.write(bounded, params=params)) == "ab"


def test_a_text_that_must_end_ends_before_the_least_number_of_tokens(byte_level: Writer) -> None:
    """The grammar sees that nothing can follow only once it has looked: /b/ and not /b/ leave the end alone."""
    lookahead = 'start: "a" REST?\nREST: /b[0-9]/ & /bx/\n'
    constraint = byte_level.compiler.compile(StructuredOutput(kind="grammar", value=lookahead))
    tokens = byte_level.write(constraint, params=SamplingParams(min_tokens=5, seed=0))
    assert byte_level.text(tokens) == "a"


def test_a_replayed_sampler_continues_the_same_text(byte_level: Writer) -> None:
    constraint = byte_level.compiler.compile(StructuredOutput(kind="regex", value="[a-z]{20}"))
    rows = [torch.randn(byte_level.vocab_size, generator=torch.Generator().manual_seed(n)) for n in range(6)]
    first = Sampler(SamplingParams(seed=4), (), byte_level.vocab_size, constraint=constraint.fork())
    tokens = [first.sample(row) for row in rows]
    second = Sampler(SamplingParams(seed=4), (), byte_level.vocab_size, constraint=constraint.fork())
    second.replay(tokens[:3])
    assert [second.sample(row) for row in rows[3:]] == tokens[3:]


def test_forks_and_requests_do_not_move_each_other(byte_level: Writer) -> None:
    output = StructuredOutput(kind="choice", value=("ab", "cd"))
    first, second = byte_level.compiler.compile(output), byte_level.compiler.compile(output)
    start = second.allowed().tolist()
    first.accept(byte_level.tokenizer.convert_tokens_to_ids("a"))
    third = first.fork()
    assert second.allowed().tolist() == start != first.allowed().tolist()
    third.accept(byte_level.tokenizer.convert_tokens_to_ids("b"))
    assert third.finished
    assert not first.finished


def test_a_token_that_is_not_allowed_fails_the_constraint(byte_level: Writer) -> None:
    constraint = byte_level.compiler.compile(StructuredOutput(kind="choice", value=("secret",)))
    with pytest.raises(ConstraintFailed) as caught:
        constraint.accept(byte_level.tokenizer.convert_tokens_to_ids("x"))
    assert "secret" not in str(caught.value)
    with pytest.raises(ConstraintFailed):
        constraint.allowed()


def test_a_model_that_gives_the_allowed_tokens_no_probability_fails(byte_level: Writer) -> None:
    constraint = byte_level.compiler.compile(StructuredOutput(kind="choice", value=("z",)))
    logits = torch.zeros(byte_level.vocab_size)
    logits[byte_level.tokenizer.convert_tokens_to_ids("z")] = -torch.inf
    sampler = Sampler(SamplingParams(), (), byte_level.vocab_size, constraint=constraint)
    with pytest.raises(ConstraintFailed, match="no probability"):
        sampler.sample(logits)


def test_a_token_that_takes_too_much_work_fails_one_constraint_only(byte_level: Writer) -> None:
    """Ten ways to split a text at each of its places, and each of those ten ways."""
    grammar = StructuredOutput(kind="grammar", value='start: a\na: a a a a a a a a a a | "x" |')
    constraint, other = byte_level.compiler.compile(grammar), byte_level.compiler.compile(grammar)
    letter = byte_level.tokenizer.convert_tokens_to_ids("x")
    with pytest.raises(ConstraintFailed, match="too complex"):
        for _ in range(1000):
            constraint.accept(letter)
            constraint.allowed()
    assert other.allowed()[letter]


def nested(depth: int) -> str:
    return '{"items":' * (depth - 1) + "{}" + "}" * (depth - 1)


def test_schemas_are_limited_in_size_and_nesting() -> None:
    StructuredOutput(kind="json_schema", value=nested(MAX_SCHEMA_NESTING))
    StructuredOutput(kind="json_schema", value=json.dumps({"const": "[{" * 100 + '"\\'}))
    for deep in (nested(MAX_SCHEMA_NESTING + 1), "[" * MAX_SCHEMA_BYTES, '{"a":' * 10_000):
        with pytest.raises(InvalidRequest, match=f"nested at most {MAX_SCHEMA_NESTING} deep"):
            StructuredOutput(kind="json_schema", value=deep)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (
            {"kind": "json_schema", "value": '{"description": "' + "é" * (MAX_SCHEMA_BYTES // 2) + '"}'},
            "at most 65536 bytes",
        ),
        ({"kind": "regex", "value": "a" * (MAX_REGEX_BYTES + 1)}, "at most 4096 bytes"),
        ({"kind": "grammar", "value": "a" * (MAX_GRAMMAR_BYTES + 1)}, "at most 65536 bytes"),
        ({"kind": "json_schema", "value": "SECRET"}, "not valid JSON"),
        ({"kind": "json_schema", "value": '["SECRET"]'}, "must be a JSON object"),
        ({"kind": "json_schema", "value": '"' + '\\"' * (MAX_SCHEMA_BYTES // 2 - 1)}, "not valid JSON"),
        ({"kind": "json_object", "value": "SECRET"}, "takes no value"),
        ({"kind": "regex"}, "not empty"),
        ({"kind": "regex", "value": ("SECRET",)}, "must be a string"),
        ({"kind": "regex", "value": "SECRET\ud83d"}, "surrogate"),
        ({"kind": "choice", "value": "SECRET"}, "must hold 1 to 256 strings"),
        ({"kind": "choice", "value": ()}, "must hold 1 to 256 strings"),
        ({"kind": "choice", "value": ("SECRET",) * (MAX_CHOICES + 1)}, "must hold 1 to 256 strings"),
        ({"kind": "choice", "value": ("",)}, "1 to 256 characters"),
        ({"kind": "choice", "value": ("S" * (MAX_CHOICE_CHARACTERS + 1),)}, "1 to 256 characters"),
        ({"kind": "choice", "value": (7,)}, "1 to 256 characters"),
        ({"kind": "choice", "value": ("SECRET\ud83d",)}, "surrogate"),
        ({"kind": "SECRET", "value": "x"}, "must be of kind"),
    ],
)
def test_what_breaks_a_rule_is_refused_by_its_field_and_not_repeated(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason) as caught:
        StructuredOutput(**values, parameter="guided")
    assert caught.value.field == "guided"
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "value", "reason"),
    [
        ("regex", "(SECRET", "regex is not valid"),
        ("regex", "(?=SECRET)a", "look-around"),
        ("regex", "(" * 1500 + "SECRET" + ")" * 1500, "regex is not valid"),
        ("regex", r"SECRET\b", "word boundaries"),
        ("grammar", "SECRET", "grammar is not valid"),
        ("grammar", "root ::= SECRET", "grammar is not valid"),
        ("grammar", "start: " + "(" * 20_000 + '"SECRET"' + ")" * 20_000, "grammar is too complex"),
        ("grammar", "start: start", "no text can meet the grammar"),
        ("json_schema", {"type": "SECRET"}, "json_schema is not valid"),
        ("json_schema", {"type": "string", "format": "SECRET"}, "unknown format"),
        ("json_schema", {"$ref": "http://localhost/SECRET"}, "remote references"),
        ("json_schema", {"$ref": "#"}, "no text can meet the json_schema"),
        ("json_schema", {"enum": []}, "no text can meet the json_schema"),
        ("json_schema", {"not": {"const": "SECRET"}, "uniqueItems": True}, "enforced: it uses not, uniqueItems"),
        ("json_schema", {"oneOf": [{"type": "string"}, {"const": "SECRET"}]}, "enforced: it uses oneOf"),
        ("json_schema", {"x-guidance": {"lenient": True}, "not": {"const": "SECRET"}}, "enforced: it uses not"),
    ],
)
def test_what_cannot_be_compiled_is_refused_and_not_repeated(
    byte_level: Writer, kind: Any, value: Any, reason: str
) -> None:
    text = value if isinstance(value, str) else json.dumps(value)
    with pytest.raises(InvalidRequest, match=reason) as caught:
        byte_level.compiler.compile(StructuredOutput(kind=kind, value=text, parameter="guided"))
    assert caught.value.field == "guided"
    assert "SECRET" not in str(caught.value)


def chain(rules: int) -> str:
    links = [f'r{index}: "x" r{index + 1}' for index in range(rules)]
    return "\n".join(["start: r0", *links, f'r{rules}: "a"'])


BOMBS = {
    "an endless computation": ("json_schema", '{"type": "integer", "multipleOf": 99999999}'),
    "patterns to intersect": (
        "json_schema",
        json.dumps({"allOf": [{"type": "string", "pattern": f"(a|b)*a(a|b){{{n}}}$"} for n in range(30)]}),
    ),
    "a stack to overflow": ("grammar", chain(3500)),
    "a product of alternatives": (
        "json_schema",
        json.dumps(
            {"allOf": [{"anyOf": [{"properties": {f"p{n}": {"const": k}}} for k in range(4)]} for n in range(12)]}
        ),
    ),
    "doubling tokens": (
        "grammar",
        "\n".join(["start: R0", *(f"R{n}: R{n + 1} R{n + 1}" for n in range(40)), 'R40: "a"']),
    ),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_what_takes_too_much_to_compile_is_refused(
    byte_level: Writer, monkeypatch: pytest.MonkeyPatch, bomb: str
) -> None:
    """By a limit on the processor time and memory of a process of its own, not on the clock; and once."""
    monkeypatch.setattr(structured_module, "PROBE_CPU_SECONDS", 1)
    kind, value = BOMBS[bomb]
    output: Any = StructuredOutput(kind=kind, value=value)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="too complex"):
        byte_level.compiler.compile(output)
    monkeypatch.setattr(structured_module, "_probe", pytest.fail)
    with pytest.raises(InvalidRequest, match="too complex"):
        byte_level.compiler.compile(output)


@pytest.mark.parametrize(
    "pattern",
    ["a{1,1000000}", "((a{1,1000}){1,1000}){1,1000}", "(a|b)*a(a|b){200}", "(a+)+b", "|".join(map(str, range(700)))],
)
def test_large_regular_expressions_cost_little_until_they_are_walked(byte_level: Writer, pattern: str) -> None:
    """Each token's work is bounded: within its bounds these are followed."""
    constraint = byte_level.compiler.compile(StructuredOutput(kind="regex", value=pattern))
    random = np.random.default_rng(0)
    for _ in range(100):
        allowed = np.flatnonzero(constraint.allowed())
        constraint.accept(int(random.choice(allowed)))
        if constraint.finished:
            break


def test_hundreds_of_optional_properties_are_no_bomb(byte_level: Writer) -> None:
    schema = {"type": "object", "properties": {f"key{n}": {"type": "integer"} for n in range(200)}}
    text = byte_level.text(byte_level.write(byte_level.compiler.compile(schema_output(schema)), 2))
    jsonschema.validate(json.loads(text), schema)


def test_a_circular_reference_below_a_property_is_a_tree(byte_level: Writer) -> None:
    tree = {
        "$defs": {"tree": {"type": "object", "properties": {"left": {"$ref": "#/$defs/tree"}}, "required": []}},
        "$ref": "#/$defs/tree",
    }
    text = byte_level.text(byte_level.write(byte_level.compiler.compile(schema_output(tree)), 1))
    jsonschema.validate(json.loads(text), tree)


def test_space_between_the_parts_of_a_json_text_is_bounded(byte_level: Writer) -> None:
    constraint = byte_level.compiler.compile(StructuredOutput(kind="json_object"))
    pieces = byte_level.tokenizer.convert_tokens_to_ids(["{", "Ġ"])
    constraint.accept(pieces[0])
    spaces = 0
    while constraint.allowed()[pieces[1]]:
        constraint.accept(pieces[1])
        spaces += 1
    assert spaces == 40


def test_what_was_compiled_last_is_kept(byte_level_tokenizer: PreTrainedTokenizerFast) -> None:
    compiler, probed = GrammarCompiler(byte_level_tokenizer, {1}), []
    original = structured_module._compile

    def counted(output: StructuredOutput, tokenizer: Any) -> Any:
        probed.append(output.value)
        return original(output, tokenizer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(structured_module, "_compile", counted)
        patch.setattr(structured_module, "MAX_COMPILED", 2)
        for value in ("a", "b", "a", "c", "a", "b"):
            compiler.compile(StructuredOutput(kind="regex", value=value))
        compiler.compile(StructuredOutput(kind="regex", value="b", parameter="another"))
    assert probed == ["a", "b", "c", "b"]
    assert MAX_COMPILED >= 2


def test_a_tokenizer_without_known_bytes_is_the_users_error(byte_level_tokenizer: PreTrainedTokenizerFast) -> None:
    compiler = GrammarCompiler(WithoutBackend(), {1})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        compiler.compile(StructuredOutput(kind="json_object"))


class WithoutBackend:
    """A slow tokenizer has no `backend_tokenizer`."""


@pytest.mark.parametrize("name", WITH_ALL_BYTES)
@pytest.mark.parametrize("text", ["AAA", "ééé", "☃☃", "😀😀", "e\u0301", '"\\'])
def test_the_tokenizers_own_way_to_spell_a_text_is_allowed(writers: dict[str, Writer], name: str, text: str) -> None:
    writer = writers[name]
    constraint = writer.compiler.compile(schema_output({"const": text}))
    tokens = writer.tokenizer.encode(json.dumps(text, ensure_ascii=False), add_special_tokens=False)
    # SentencePiece's own spelling begins with a space, which is no part of the JSON text.
    for token in tokens[1:] if writer.bytes_of(tokens[0]) == b" " else tokens:
        assert constraint.allowed()[token]
        constraint.accept(token)
    assert constraint.finished
