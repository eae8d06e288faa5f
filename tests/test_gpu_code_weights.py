"""How `benchmarks.gpu_code` weighs instructions: by their lines and basic blocks, and which weights
it refuses."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton", minversion="3.3")  # whose compiler the tool knows

from benchmarks.gpu_code.cases.order_statistic import num_passes  # noqa: E402
from benchmarks.gpu_code.cases.search import search  # noqa: E402
from benchmarks.gpu_code.sass import (  # noqa: E402
    Instruction,
    Region,
    Weight,
    WeightError,
    check,
    functions,
    issued,
)

SOURCE = """\
void rare(int x) {
  report(x);
}
void kernel() {
  if (bad(x) &&
      worse(x)) {
    rare(x);
  }
  for (int i = 0; i < n; ++i) {
    add(i);
    add(-i);
  }
  if (one) return;
  sum();
  store();
}
"""
LINE = {text.strip(): i for i, text in enumerate(SOURCE.splitlines(), 1)}


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "kernel.cu"
    path.write_text(SOURCE)
    return path


def region(*headers, rest=False):
    return Region("kernel.cu", headers, rest)


LOOP = region("void kernel(", "for (int i")
IF = region("void kernel(", "if (bad")


def at(source, *lines, block=0, back_to=None):
    """An instruction of a line of the source, inlined at the others."""
    chain = tuple((str(source), LINE[line]) for line in lines)
    return Instruction("IADD3 R0, R0, R1, RZ", chain, block, back_to)


def count(weights, *instructions):
    return issued(instructions, weights)


def test_a_condition_runs_where_its_body_does_not(source):
    condition, body = at(source, "if (bad(x) &&"), at(source, "rare(x);", block=1)
    more, called = at(source, "worse(x)) {"), at(source, "report(x);", "rare(x);", block=1)
    assert count([Weight(0, IF)], condition, more, body, called) == [1, 1, 0, 0]
    # Also one that calls a function.
    assert count([Weight(0, IF)], at(source, "report(x);", "if (bad(x) &&")) == [1]


def test_on_a_line_with_its_condition_only_what_is_inlined_is_the_body(source):
    weights = [Weight(0, region("void kernel(", "if (one) return;"))]
    line = "if (one) return;"
    assert count(weights, at(source, line), at(source, "report(x);", line, block=1)) == [1, 0]


def test_the_rest_of_a_block(source):
    weights = [Weight(0, region("void kernel(", "if (one) return;", rest=True))]
    lines = "if (one) return;", "sum();", "store();"
    found = [at(source, line, block=i) for i, line in enumerate(lines)]
    assert count(weights, *found) == [1, 0, 0]


def test_a_basic_block_counts_as_most_of_it_does(source):
    loop = [at(source, "add(i);")] * 3
    assert count([Weight(8, LOOP)], *loop, at(source, "store();")) == [8] * 4
    assert count([Weight(8, LOOP)], *loop, *[at(source, "store();")] * 4) == [1] * 7
    # A loop of one block counts as its jump does, whatever the lines of its other instructions are.
    jump = at(source, "for (int i = 0; i < n; ++i) {", back_to=0)
    others = [at(source, "store();")] * 4
    assert count([Weight(0.5, LOOP)], *others, jump) == [0.5] * 5


def test_what_was_moved_out_of_a_loop_has_no_share_in_its_trips(source):
    jump = at(source, "for (int i = 0; i < n; ++i) {", block=1, back_to=1)
    before, inside = at(source, "add(i);"), at(source, "add(i);", block=1)
    copy = at(source, "add(-i);", block=2)
    assert count([Weight(8, LOOP)], before, inside, jump, copy) == [1, 8, 8, 1]
    of_two = Weight(4, LOOP, outside=0.5)  # turns, and what is left behind the loop
    assert count([of_two], inside, jump, copy) == [4, 4, 0.5]


def test_weights_of_calls_multiply(source):
    function = region("void rare(")
    called = at(source, "report(x);", "add(i);")
    assert count([Weight(8, LOOP), Weight(0.5, function)], called) == [4]
    check([called], [Weight(8, LOOP), Weight(0.5, function)])


@pytest.mark.parametrize(
    ("weights", "lines", "message"),
    [
        (
            [Weight(0.5, region("void rare(")), Weight(0.5, region("void kernel(", "add(i);"))],
            ("report(x);", "add(i);"),
            "and the line that calls it",
        ),
        ([Weight(8, LOOP), Weight(8, LOOP)], ("add(i);",), "overlap"),
        ([Weight(8, LOOP), Weight(0, IF)], ("add(i);",), "no instruction lies in .*if .bad"),
    ],
    ids=["a function and its call", "twice", "of nothing"],
)
def test_weights_that_count_twice_or_nothing_are_refused(source, weights, lines, message):
    with pytest.raises(WeightError, match=message):
        check([at(source, *lines)], weights)


def test_a_loop_without_a_weight_is_refused(source):
    jump = at(source, "for (int i = 0; i < n; ++i) {", back_to=0)
    with pytest.raises(WeightError, match="no weight is for the loop at .*kernel.cu:9: for"):
        check([jump], [])
    check([jump], [Weight(3, LOOP)])
    # One that never runs needs none.
    check([jump], [Weight(0, region("void kernel("))])


DISASSEMBLY = """\
	.section	.text.kernel,"ax",@progbits
	//## File "/k.cu", line 3
        /*0000*/                   MOV R1, R2 ;
.L_x_0:
	//## File "/k.cu", line 4 inlined at "/k.cu", line 9
	//## File "/k.cu", line 9
        /*0010*/                   IADD3 R0, R0, 0x1, RZ ;
        /*0020*/               @P0 BRA `(.L_x_0) ;
        /*0030*/                   NOP ;
        /*0040*/                   EXIT ;
.L_x_1:
        /*0050*/                   BRA `(.L_x_1);
"""


def test_blocks_of_a_disassembly():
    (found,) = functions(DISASSEMBLY).values()
    assert [i.opcode for i in found] == ["MOV", "IADD3", "BRA", "EXIT"]  # not what pads the end
    assert [i.block - found[0].block for i in found] == [0, 1, 1, 2]
    assert found[2].back_to == found[2].block
    assert found[1].lines == (("/k.cu", 4), ("/k.cu", 9))


def test_passes_of_a_search():
    assert num_passes(64, 1) < num_passes(64, 3) < 9


def _distributions(count):
    """What logits may look like, and what is hard to interpolate or to sample."""
    rng = np.random.default_rng(0)
    normal, uniform, place = rng.standard_normal(count), rng.random(count), np.arange(count)
    return {
        "normal": 3 * normal,
        "uniform": uniform,
        "exponential": -np.log(1 - uniform),
        "cauchy": rng.standard_cauchy(count),
        "lognormal": np.exp(3 * normal),
        "two peaks": normal + np.where(uniform < 0.5, 100, -100),
        "one far above": np.where(place == count // 3, 3e4, normal),
        "constant": np.full(count, 2.5),
        "two values": np.where(uniform < 0.3, 1.0, -1.0),
        "few values": np.round(2 * normal),
        "half of them ties": np.where(uniform < 0.5, 0.5, normal),
        "ascending": np.sort(normal),
        "descending": np.sort(normal)[::-1].copy(),
        "periodic": np.sin(2 * np.pi * place / (count // 256)),  # samples are all the same
        "mostly -inf": np.where(uniform < 0.01, normal, -np.inf),
        "tiny": 1e-4 * normal,
        "huge": 1e4 * normal,
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_search_for_the_kth_largest_logit_takes_few_passes(dtype):
    count = 50304
    passes = {}
    for name, logits in _distributions(count).items():
        x = torch.from_numpy(logits.clip(-np.inf, 6e4)).to(dtype)
        for k in (1, 2, 50, 1000, count // 3, count - 1):
            found = search(x, k)
            passes[name, k] = found.counts + found.lists
    assert max(passes.values()) <= 13, passes
    assert max(n for (name, _), n in passes.items() if name == "normal") <= 6
