"""How long a row's greedy text stays the teacher's, after prompts that no near set holds."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from unspool_conversion.evaluation.bootstrap import Bootstrap
from unspool_conversion.evaluation.likelihood import as_record
from unspool_conversion.evaluation.readers import Reader, Reading
from unspool_conversion.evaluation.variants import EQUAL_BYTES, TEACHER, WINDOW_ONLY


def greedy_tokens(reader: Reader, reading: Reading, hidden: Tensor, count: int) -> Tensor:
    """The likeliest token after the last vector of `hidden` [T, hidden], fed back, `count` times: [count]."""
    chosen = [reader.logits(hidden[-1:]).argmax(-1)]
    while len(chosen) < count:
        chosen.append(reader.logits(reading.feed(chosen[-1])).argmax(-1))
    return torch.cat(chosen)


@torch.inference_mode()
def measure_greedy(
    readers: Mapping[str, Reader], prompts: Tensor, count: int, bootstrap: Bootstrap, progress: Callable[[], object]
) -> dict[str, Any]:
    """Of `count` greedy tokens after prompts [S, T], how many are the teacher's before the first that is not."""
    lengths: dict[str, list[int]] = {name: [] for name in readers}
    for prompt in prompts:
        reading = readers[TEACHER].begin()
        text = torch.cat([prompt, greedy_tokens(readers[TEACHER], reading, reading.feed(prompt), count)])
        for name, reader in readers.items():
            lengths[name].append(count if name == TEACHER else _matching(reader, text, count))
            progress()
    matched = {name: torch.tensor(values, dtype=torch.float64)[:, None] for name, values in lengths.items()}
    rows = {
        name: {
            "match": as_record(bootstrap.mean(values)),
            "minus_window_only": as_record(bootstrap.mean(values - matched[WINDOW_ONLY])),
            "minus_equal_bytes": as_record(bootstrap.mean(values - matched[EQUAL_BYTES])),
        }
        for name, values in matched.items()
    }
    return {"prompt_tokens": prompts.shape[1], "tokens": count, "rows": rows}


def _matching(reader: Reader, text: Tensor, count: int) -> int:
    """Up to its first other choice a row's own greedy text is the teacher's: one reading of that tells its length."""
    own = reader.logits(reader.hidden(text)[-count - 1 : -1]).argmax(-1)
    return int((own == text[-count:]).cumprod(0).sum())
