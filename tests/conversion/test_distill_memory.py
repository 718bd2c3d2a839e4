"""What layerwise training takes of the machine: memory for one layer at a time, however many there are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = """
import ctypes, gc, sys
from pathlib import Path

import torch

from unspool.config import UnspoolConfig, linearize_block
from unspool.mixer_spec import PRESETS
from unspool.model import UnspoolForCausalLM
from unspool_conversion.distillation.corpus import Corpus
from unspool_conversion.distillation.layer_losses import LayerLoss, training_loss
from unspool_conversion.distillation.layerwise import run_layerwise
from unspool_conversion.distillation.recipe_files import parse_recipe
from unspool_conversion.distillation.run import Run, RunOptions
from unspool_conversion.distillation.student import Student
from unspool_conversion.distillation.teachers import SharedTeacher

HIDDEN, LENGTH, BATCH, LAYERS, SEQUENCES, WINDOW = 512, 768, 2, 5, 4, 64
RECIPE = f'''
name: memory
length: {LENGTH}
sequences: {SEQUENCES}
lora: {{rank: 8}}
stages:
- {{kind: layerwise, steps: 2, batch: {BATCH}, lora: [v_proj, o_proj], least_bias: -4, evaluations: 1}}
'''

def memory(name):
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024

def forget_peak():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")

def train_one_layer(student, stage):
    mixer = student.layers[0].self_attn
    for parameter in (student.far(0) | student.lora(stage.lora, 0)).values():
        parameter.requires_grad_(True)
    x, target = torch.randn(2, BATCH, LENGTH, HIDDEN)
    loss = LayerLoss(mixer, mixer.spec.near_tokens, None, stage.state_weight, 1.0)
    before = forget_peak()
    training_loss(loss, x, target, student.context((BATCH, LENGTH)))[0].backward()
    return before

def train_all(student, recipe, directory):
    tokens = torch.randint(256, (SEQUENCES, LENGTH))
    corpus = Corpus(tokens, torch.ones_like(tokens, dtype=torch.bool), 1)
    options = RunOptions(directory=directory, identity={}, resume=False, checkpoint_seconds=1e9)
    run = Run(options, recipe, student, corpus, SharedTeacher(student))
    run.progress.stages.append({"kind": "layerwise"})
    before = forget_peak()
    run_layerwise(run, recipe.stages[0])
    assert all("error_after" in layer for layer in run.progress.stages[0]["layers"])
    return before

torch.set_num_threads(1)
torch.manual_seed(0)
config = UnspoolConfig(
    vocab_size=256,
    hidden_size=HIDDEN,
    intermediate_size=2 * HIDDEN,
    num_hidden_layers=LAYERS,
    num_attention_heads=HIDDEN // 64,
    num_key_value_heads=HIDDEN // 64,
    head_dim=64,
    linearize=linearize_block("disjoint", PRESETS["disjoint"].replace(window=WINDOW), {}),
)
recipe = parse_recipe(RECIPE, "recipe")
student = Student(UnspoolForCausalLM(config), recipe.lora, [None] * LAYERS, 0)
if sys.argv[1] == "layer":
    before = train_one_layer(student, recipe.stages[0])
else:
    before = train_all(student, recipe, Path(sys.argv[2]))
print(memory("VmHWM") - before)
"""


def peak_beyond_the_model(what: str, directory: Path) -> int:
    """Bytes, in a process of its own that gives back what it frees."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "MALLOC_MMAP_THRESHOLD_": "1048576",
    }
    command = [sys.executable, "-c", CHILD, what, str(directory / "run")]
    child = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert child.returncode == 0, child.stderr
    return int(child.stdout.split()[-1])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")
def test_layerwise_training_takes_the_memory_of_one_layer(tmp_path: Path) -> None:
    """A forward and a backward pass of one layer, against the whole stage, which adds its text, moments and copies."""
    layer = peak_beyond_the_model("layer", tmp_path)
    stage = peak_beyond_the_model("stage", tmp_path)
    assert layer > 150e6  # so that Python's own allocations are noise
    assert layer < stage <= 1.5 * layer
