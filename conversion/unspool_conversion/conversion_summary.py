"""What the verb `convert` prints: the account of a dry run, and the summary of a conversion."""

from typing import Any

from unspool_conversion.convert import ConversionResult
from unspool_conversion.estimates import estimate_seconds
from unspool_conversion.options import ConvertOptions
from unspool_conversion.plan import ConversionPlan
from unspool_conversion.trained_conversion import TrainingOptions


def describe_plan(plan: ConversionPlan, options: ConvertOptions, training: TrainingOptions | None) -> str:
    """What becomes of every tensor, what the model and its sessions will take, and how long it may last."""
    accounting, sizes = plan.accounting(), plan.sizes()
    seconds = estimate_seconds(plan, options.calibration.num_tokens)
    lines = [
        ("source tensors", f"{accounting['source_tensors']:,}"),
        ("  used", f"{accounting['used']:,}"),
        ("  dropped", f"{len(accounting['dropped']):,}"),
        *((f"    {name}", reason) for name, reason in accounting["dropped"].items()),
        ("destination tensors", f"{accounting['destination_tensors']:,}"),
        ("  from the source", f"{accounting['used']:,}"),
        ("  new", f"{len(accounting['new']):,}"),
        ("parameters", f"{sizes['parameters']:,}"),
        ("  new", f"{sizes['new_parameters']:,}"),
        ("weights", f"{sizes['weight_bytes']:,} bytes, {sizes['dtype'] if plan.quant == 'none' else plan.quant}"),
        *_state_lines(plan),
        ("teacher's cache", f"{sizes['teacher_cache_bytes_per_token']:,} bytes per token"),
        ("exact up to", "any length" if plan.exact_tokens is None else f"{plan.exact_tokens:,} tokens"),
        ("time", f"about {seconds:,.0f} s, an estimate{'' if training is None else ' without the training'}"),
        *([] if training is None else [("training", _training_text(plan, training))]),
    ]
    width = max(len(name) for name, _ in lines) + 2
    return "".join(f"{name:<{width}}{value}\n" for name, value in lines)


def _state_lines(plan: ConversionPlan) -> list[tuple[str, str]]:
    sizes, kept = plan.sizes(), plan.kept_softmax
    state = f"{sizes['state_bytes_per_session']:,} bytes"
    if kept is None:
        return [("state per session", f"{state} at any length")]
    softmax = f"{sizes['softmax_bytes_per_session']:,} bytes"
    return [
        ("state per session", f"{state}, sized for {kept.capacity:,} tokens"),
        ("  not constant-memory", f"{softmax} for full attention in {kept.names}"),
    ]


def _training_text(plan: ConversionPlan, training: TrainingOptions) -> str:
    stages = ", ".join(stage.kind for stage in training.recipe.stages)
    tokens = training.num_tokens(plan.config.num_hidden_layers)
    return f"recipe {training.recipe.name} ({stages}), {tokens:,} tokens read"


def describe_result(result: ConversionResult) -> str:
    """What was made, and, when that is not constant-memory or was trained, so."""
    sizes = result.report["sizes"]
    kept = result.plan.kept_softmax
    lines = [
        f"{result.destination}: {sizes['parameters']:,} parameters ({sizes['new_parameters']:,} new), "
        f"{sizes['state_bytes_per_session']:,} bytes of state per session"
    ]
    if kept is not None:
        lines.append(
            f"not constant-memory: {sizes['softmax_bytes_per_session']:,} of these bytes are for full attention over "
            f"{kept.capacity:,} tokens in {kept.names}"
        )
    if "distillation" in result.report:
        lines.append(_trained_text(result.report["distillation"]))
    return "\n".join(lines) + "\n"


def _trained_text(training: dict[str, Any]) -> str:
    return (
        f"recipe {training['recipe']['name']}, seed {training['seed']}: {training['trained_parameters']:,} parameters "
        f"trained ({training['trained_share']:.1%} of the model's) on {training['tokens']:,} tokens "
        f"in {training['seconds']:,.0f} s"
    )
