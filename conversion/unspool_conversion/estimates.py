"""How long a conversion will take, guessed from this machine's matrix product and the plan; only ever an estimate."""

import time

import torch

from unspool.executor import Quant
from unspool_conversion.calibration import calibrated_specs
from unspool_conversion.plan import ConversionPlan

_PROBE_SIZE = 768
_PROBE_SECONDS = 0.25
_CALIBRATION_FORWARDS = 4.0
"""A calibration's cost in forward passes over its text: the teacher's pass, and the search in every layer."""
_BYTES_PER_SECOND = 3e8
"""Reading, converting and writing weights, and reading the source once more for its checksum."""
_QUANTIZED_WEIGHTS_PER_SECOND: dict[Quant, float] = {"int8": 1.5e8, "int4": 2.5e7}


def estimate_seconds(plan: ConversionPlan, calibration_tokens: int) -> float:
    """Seconds of calibration, where a layer has something to calibrate, and copying, to a factor of about two."""
    copying = 2.0 * plan.num_bytes / _BYTES_PER_SECOND
    if plan.quant in _QUANTIZED_WEIGHTS_PER_SECOND:
        copying += plan.num_parameters / _QUANTIZED_WEIGHTS_PER_SECOND[plan.quant]
    if not calibrated_specs(plan.config):
        return copying
    return _CALIBRATION_FORWARDS * 2.0 * plan.num_parameters * calibration_tokens / _measure_flops() + copying


def _measure_flops() -> float:
    """Floating-point operations per second of a float32 matrix product with torch's present thread count."""
    x = torch.full((_PROBE_SIZE, _PROBE_SIZE), 1e-3)
    torch.mm(x, x)
    start, products = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < _PROBE_SECONDS:
        torch.mm(x, x)
        products += 1
    return 2.0 * _PROBE_SIZE**3 * products / elapsed
