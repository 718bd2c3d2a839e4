"""A process that reads a hundred thousand tokens is no larger than one that read a hundred."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from unspool import UnspoolConfig, UnspoolForCausalLM
from unspool.state import kv_cache_bytes

READ = """
import resource, sys, torch
from unspool.loading import load
from unspool.state import StatePool
from unspool import UnspoolForCausalLM

model = UnspoolForCausalLM.from_pretrained(sys.argv[1])
pool = StatePool(model.config, 1, torch.float32, "cpu")
digests = set()

def read(tokens):
    with torch.inference_mode():
        for _ in range(tokens // 128):
            model.hidden(torch.randint(model.config.vocab_size, (1, 128)), slots=(pool, [0]))
        for _ in range(100):
            hidden = model.hidden(torch.zeros(1, 1, dtype=torch.int64), slots=(pool, [0]))
    assert hidden.isfinite().all()
    assert all(tensor.isfinite().all() for layer in pool.layers for tensor in layer.values())
    kilobytes = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmRSS:"))
    print(pool.positions[0], pool.num_bytes, kilobytes)

read(128)
read(20_000)  # until the allocator has settled
read(80_000)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux's account of a process")
def test_memory_is_flat_from_a_hundred_to_a_hundred_thousand_tokens(tmp_path: Path) -> None:
    torch.manual_seed(0)
    UnspoolForCausalLM(UnspoolConfig(num_hidden_layers=2, hidden_size=128, vocab_size=500)).save_pretrained(tmp_path)
    result = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path)], capture_output=True, text=True, timeout=600, check=True
    )
    rows = [tuple(map(int, line.split())) for line in result.stdout.splitlines()]
    (_, first_bytes, _), (_, _, warm), (position, last_bytes, last) = rows
    assert position > 100_000
    assert last_bytes == first_bytes
    cache = kv_cache_bytes(UnspoolConfig.from_pretrained(tmp_path), 80_000) // 1000
    assert last - warm < cache / 20, f"{warm} kB after 20,000 tokens, {last} kB after 100,000; a cache takes {cache} kB"
