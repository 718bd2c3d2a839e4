"""The whole road on a real model: fetch, convert with the shipped adapter, verify, serve, ask over REST, and print what
was measured."""

import argparse
import json
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from unspool_conversion.default_model import fetch_default_model
from unspool_conversion.reports import describe_verification, load_report

ROOT = Path(__file__).resolve().parents[2]
UNSPOOL = Path(sys.executable).with_name("unspool")
PROSE = Path(__file__).with_name("prose.jsonl")
ADAPTER = "smollm2-135m-instruct"
QUESTION = "In two sentences: why is the sky blue?"
FACT, FACT_QUESTION = "The pass key for Juniper is 48213.", "What is the pass key for Juniper?"
CHARACTERS_BETWEEN = 4_700  # a thousand tokens
CONTEXTS = (1_000, 8_000, 128_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "models" / "SmolLM2-135M-Instruct-unspool")
    output = parser.parse_args().output
    started = time.monotonic()
    source = fetch_default_model()
    say(f"Teacher: {source}")
    run("convert", str(source), str(output), "--adapter", ADAPTER, "--overwrite")
    run("verify", str(output), "--teacher", str(source), "--text", str(PROSE), quiet=True)
    with server(output) as url:
        answer = ask(url, output.name, QUESTION)
        say("\nAnd a fact, then a thousand tokens of a novel, then a question about the fact:")
        recalled = ask(url, output.name, f"{FACT}\n\n{passage()}\n\n{FACT_QUESTION}")
    report = load_report(output)
    say("\nWhat was measured\n")
    say(describe_verification(report["verification"]))
    say(memory_table(report["sizes"]))
    say(f"The fact opened a prompt of {recalled['prompt_tokens']} tokens; {report['exact_tokens']} tokens are exact.")
    say(f"Answer: {answer['tokens']} tokens, {answer['tokens_per_second']:.1f} tokens/s over REST on this machine.")
    say(f"Done in {time.monotonic() - started:.0f} s. Talk to it: {UNSPOOL} chat {output}")


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def run(*arguments: str, quiet: bool = False) -> None:
    """Runs one command as a user would type it, and stops the demo when it fails."""
    say(f"\n$ unspool {shlex.join(arguments)}")
    command = [str(UNSPOOL), *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL if quiet else None)


@contextmanager
def server(model: Path) -> Iterator[str]:
    """A server process on a free port of this machine, ready to answer; it ends with the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = ["serve", str(model), "--port", str(port), "--log-level", "warning"]
    say(f"\n$ unspool {shlex.join(arguments)}")
    process = subprocess.Popen([str(UNSPOOL), *arguments], stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(process, url)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=60)


def wait_until_ready(process: subprocess.Popen[bytes], url: str) -> None:
    for _ in range(600):
        if process.poll() is not None:
            raise SystemExit(f"the server ended with exit code {process.returncode}")
        try:
            with urllib.request.urlopen(f"{url}/health/ready", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    raise SystemExit("the server was not ready within two minutes")


def passage() -> str:
    """The beginning of a novel's chapter."""
    with PROSE.open(encoding="utf-8") as lines:
        text: str = json.loads(next(lines))["text"]
    return text[:CHARACTERS_BETWEEN]


def ask(url: str, model: str, question: str) -> dict[str, float]:
    """Streams one chat answer to standard output; returns its length, its prompt's, and speed after the first token."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 120,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    shown = body | {"messages": [{"role": "user", "content": shortened(question)}]}
    say(f"\n$ curl {url}/v1/chat/completions -d {shlex.quote(json.dumps(shown))}\n")
    first, tokens, prompt_tokens = 0.0, 0, 0
    for chunk in stream(f"{url}/v1/chat/completions", body):
        if chunk.get("usage"):
            tokens, prompt_tokens = chunk["usage"]["completion_tokens"], chunk["usage"]["prompt_tokens"]
        for choice in chunk["choices"]:
            text = choice["delta"].get("content") or ""
            first = first or (time.perf_counter() if text else 0.0)
            sys.stdout.write(text)
            sys.stdout.flush()
    say("")
    speed = (tokens - 1) / (time.perf_counter() - first)
    return {"tokens": tokens, "prompt_tokens": prompt_tokens, "tokens_per_second": speed}


def shortened(text: str) -> str:
    """A long text's two ends."""
    return text if len(text) < 300 else f"{text[:120]} [...] {text[-120:]}"


def stream(url: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The data frames of a server-sent event stream, up to [DONE]."""
    request = urllib.request.Request(
        url, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}, method="POST"
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        for line in response:
            data = line.decode().removeprefix("data: ").strip()
            if data == "[DONE]":
                return
            if data:
                yield json.loads(data)


def memory_table(sizes: dict[str, Any]) -> str:
    """Bytes of this model's state beside those of the teacher's key-value cache, by length of the text."""
    state, per_token = sizes["state_bytes_per_session"], sizes["teacher_cache_bytes_per_token"]
    lines = ["| tokens | state | teacher's KV cache | ratio |", "| --- | --- | --- | --- |"]
    for tokens in CONTEXTS:
        cache = per_token * tokens
        lines.append(f"| {tokens:,} | {state / 1e6:.1f} MB | {cache / 1e6:,.1f} MB | {cache / state:.1f}x |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
