"""What the check of the GPU's programs says of planted ones; they are compiled by themselves."""

import copy
import json

import pytest

from benchmarks import gpu_programs

# Of a training step on 8 devices, as XLA writes it; each fault is one line more.
CLEAN = """
HloModule jit_train_step

%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}

ENTRY %main {
  %x = bf16[32,56,56,64]{3,2,1,0} parameter(0)
  %w = bf16[64,3,3,64]{3,2,1,0} parameter(1)
  %conv = (bf16[32,56,56,64]{3,2,1,0}, u8[10]{0}) custom-call(%x, %w), window={size=3x3}, \
dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward", metadata={op_name="f"}
  %y = bf16[32,56,56,64]{3,2,1,0} get-tuple-element(%conv), index=0
  %s = f32[64]{0} fusion(%y), kind=kInput, calls=%f
  ROOT %all = f32[64]{0} all-reduce(%s), to_apply=%sum
}
""".replace("\\\n", "")
PTX = ["wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16", "fma.rn.f32 %f1, %f2, %f3, %f4;"]
FAULTS = {
    "has float32 products rounded to TF32": ("", "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32"),
    "computes in float64": ("  %d = f64[64]{0} convert(%s)\n", ""),
    "moves data to or from the host": ("  %o = token[] outfeed(%s, %t)\n", ""),
    "asks the host which way to go": ("  %c = f32[64]{0} conditional(%p, %s, %s)\n", ""),
    "has convolutions other than bfloat16": (
        "  %g = (f32[2,4,4,2]{3,2,1,0}, u8[0]{0}) custom-call(%x, %w), "
        'dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward"\n',
        "",
    ),
    "calls something other": ('  %h = f32[2]{0} custom-call(%s), custom_call_target="ours"\n', ""),
}


def test_a_clean_program_breaks_no_rule():
    found = gpu_programs.facts(CLEAN, PTX)
    assert found["collectives"] == {"all-reduce": 1}
    assert (found["kernels"], found["calls"]) == (3, {"__cudnn$convForward": 1})
    assert found["convolutions"] == ["bf16 b01f_o01i->b01f"]
    assert gpu_programs.rules("train8", found) == []


@pytest.mark.parametrize("rule", FAULTS)
def test_a_planted_fault_breaks_its_rule_alone(rule):
    line, kernel = FAULTS[rule]
    text = CLEAN.replace("  ROOT %all", line + "  ROOT %all")
    (broken,) = gpu_programs.rules("train8", gpu_programs.facts(text, [*PTX, kernel]))
    assert f"train8 {rule}" in broken


def test_operations_between_devices_belong_neither_in_loops_nor_on_one_device():
    found = gpu_programs.facts(CLEAN, PTX)
    (broken,) = gpu_programs.rules("train", found)
    assert "train has operations between devices, of which there is one" in broken
    looped = CLEAN.replace("  ROOT %add", "  %r = f32[] all-reduce(%a), to_apply=%sum\n  ROOT %add")
    (broken,) = gpu_programs.rules("train8", gpu_programs.facts(looped, PTX))
    assert broken == "train8 has operations between devices in a loop: 1"


def test_figures_differ_by_more_than_a_hundredth_and_by_anything_named():
    recorded = json.loads(gpu_programs.FIGURES.read_text())["train"]
    found = copy.deepcopy(recorded)
    found |= {"seconds": 1e9, "gigabytes": recorded["gigabytes"] * 1.005}
    assert gpu_programs.differences("train", found, recorded) == []
    found |= {"gigabytes": recorded["gigabytes"] * 1.02, "sorts": recorded["sorts"] + 1}
    found["collectives"] = {"all-reduce": 1}
    lines = gpu_programs.differences("train", found, recorded)
    starts = ("train gigabytes: ", "train sorts: ", "train collectives all-reduce: 1, in gpu_prog")
    assert len(lines) == 3
    assert all(any(line.startswith(start) for line in lines) for start in starts)


def test_the_recorded_programs_break_no_rule():
    recorded = json.loads(gpu_programs.FIGURES.read_text())
    assert sorted(recorded) == sorted(gpu_programs.PROGRAMS)
    assert [gpu_programs.rules(*program) for program in recorded.items()] == [[]] * len(recorded)
