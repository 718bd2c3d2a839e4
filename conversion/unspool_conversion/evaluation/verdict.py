"""What a reader must be told before any number: when the state adds nothing, or less than a window of its
bytes."""

from typing import Any

from unspool_conversion.evaluation.bootstrap import Interval
from unspool_conversion.evaluation.likelihood import ALL, FAR
from unspool_conversion.evaluation.variants import CONVERTED, EQUAL_BYTES

FEW_DOCUMENTS = 5


def warn_of_documents(num_documents: int, num_sequences: int) -> list[str]:
    """Why intervals over this text may be too narrow."""
    if num_documents == 1:
        return [f"all {num_sequences} sequences are of one document: the intervals are over its pieces, and too narrow"]
    if num_documents < FEW_DOCUMENTS:
        return [f"intervals over {num_documents} documents are rough: use a text of {FEW_DOCUMENTS} or more"]
    return []


def warn_of_likelihood(summary: dict[str, Any]) -> list[str]:
    """Warnings from `summarize_likelihood`: a difference counts only where its paired interval does not hold 0."""
    converted = summary["rows"][CONVERTED]
    near = summary["near_tokens"]
    places = {name: ends for name, ends in summary["positions"].items() if name not in (ALL, FAR) and ends[1] > near}
    against_window = [Interval(**converted[name]["minus_window_only"]) for name in places]
    warnings = []
    if all(difference.holds_zero for difference in against_window):
        warnings.append(
            f"the far part is within noise of nothing: at no range of positions beyond the near set ({near} tokens) "
            "does the converted model differ from its window alone"
        )
    elif not any(difference.high < 0.0 for difference in against_window):
        warnings.append(
            "the far part makes predictions worse: at no range of positions beyond the near set "
            f"({near} tokens) is the converted model better than its window alone, at some it is worse"
        )
    against_bytes = Interval(**converted[FAR]["minus_equal_bytes"])
    if against_bytes.high >= 0.0:
        word = "within noise of" if against_bytes.holds_zero else "worse than"
        warnings.append(
            f"the far part does not earn its bytes: beyond the near set the converted model is {word} "
            f"{EQUAL_BYTES} ({against_bytes.value:+.4f} nats a token, "
            f"{against_bytes.low:+.4f} to {against_bytes.high:+.4f})"
        )
    return warnings
