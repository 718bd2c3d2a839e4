"""Tasks of lm-evaluation-harness, where it is installed and their data is at hand, for every row alike."""

import math
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, TypeGuard

from transformers import PreTrainedTokenizerBase

from unspool.errors import UserError
from unspool_conversion.evaluation.bootstrap import NORMAL_QUANTILE, RESAMPLES
from unspool_conversion.evaluation.readers import Reader


def check_harness(tasks: Sequence[str]) -> None:
    """Loads every task once. Raises UserError when the harness is not installed, knows no such task, or lacks its
    data, so that nothing is measured in vain."""
    if find_spec("lm_eval") is None:
        raise UserError("--lm-eval needs lm-evaluation-harness: pip install lm-eval")
    manager = _open_manager(tasks)
    for task in tasks:
        try:
            manager.load([task])
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"--lm-eval {task} cannot be loaded ({reason}): name a task of lm-eval, or the YAML file of one, whose "
                "data is in the cache or can be downloaded"
            ) from error


def measure_harness(
    readers: Mapping[str, Reader],
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    limit: int | None,
    progress: Callable[[], object],
) -> dict[str, Any]:
    """Each task's metrics by row; an interval is the harness's standard error to both sides."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    manager = _open_manager(tasks)
    rows: dict[str, Any] = {}
    for name, reader in readers.items():
        model = HFLM(pretrained=reader.model, tokenizer=tokenizer, backend="causal", batch_size=1)
        results = simple_evaluate(
            model=model,
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            bootstrap_iters=RESAMPLES,
            log_samples=False,
        )
        assert results is not None
        rows[name] = {task: _metrics(values) for task, values in results["results"].items()}
        progress()
    return {"tasks": list(tasks), "limit": limit, "rows": rows}


def _open_manager(tasks: Sequence[str]) -> Any:
    from lm_eval.tasks import TaskManager  # optional, and slow to import

    # To list the harness's own tasks takes many seconds, and a file names itself.
    return TaskManager(include_defaults=not all(task.endswith(".yaml") for task in tasks))


def _metrics(values: Mapping[str, Any]) -> dict[str, Any]:
    """The harness names a metric "acc,none" and its standard error "acc_stderr,none"."""
    metrics = {}
    for key, value in values.items():
        metric, _, filter_name = key.partition(",")
        if not filter_name or metric.endswith("_stderr") or not _is_number(value):
            continue
        error = values.get(f"{metric}_stderr,{filter_name}")
        spread = NORMAL_QUANTILE * error if _is_number(error) else None
        metrics[metric if filter_name == "none" else key] = {
            "value": float(value),
            "low": float(value) - spread if spread is not None else None,
            "high": float(value) + spread if spread is not None else None,
        }
    return metrics


def _is_number(value: Any) -> TypeGuard[float]:
    """The harness has strings and NaN where it has no number."""
    return isinstance(value, int | float) and math.isfinite(value)
