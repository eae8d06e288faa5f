"""How many kernels Triton would compile on a GPU for the tests that are run there: a plugin of
pytest for a machine without one.

    python -O -m pytest --assert=plain -W ignore -p tests.helpers.triton_variants -m triton

Launches are counted and not made, outputs are zeros, and `-O` leaves asserts out, so tests make all
calls that they would make on a GPU; what still fails means nothing. What makes a kernel another one
is what Triton's dispatch looks at: types, options, which pointers are given, their alignment, and
of numbers whether they are 1 or divide by 16, unless the module of the kernel lists them in
``_VARYING``.
"""

import sys
from collections import defaultdict

import torch
from triton.runtime.interpreter import GridExecutor

from tests.helpers import devices

OUTPUTS = {
    "corrupt_kernel": (
        "input_ids labels masked_indices times loss_weight num_masked num_maskable rows"
    ),
    "nll_kernel": "nll logits",
    "unmask_kernel": "tokens log_prob confidence",
    "choose_kernel": "kept left",
}
variants = defaultdict(dict)
test_that_runs = [""]


def specialization(value, varies):
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.data_ptr() % 16 == 0
    if isinstance(value, bool | str | None):
        return value
    if isinstance(value, float) or varies:
        return type(value).__name__
    return 1 if value == 1 else (-(2**31) <= value < 2**31, value % 16 == 0)


def count_launch(self, *arguments, **options):
    name = self.fn.__name__
    varying = getattr(sys.modules[self.fn.__module__], "_VARYING", ())
    given = dict(zip(self.arg_names, arguments, strict=False))
    key = [specialization(value, name in varying) for name, value in given.items()]
    variants[name].setdefault((*key, *sorted(options.items())), test_that_runs[0])
    for output in OUTPUTS.get(name, "").split():
        if given[output] is not None:
            given[output].zero_()


def pytest_configure(config):
    assert not __debug__, "asserts are not left out: run `python -O`"
    GridExecutor.__call__ = count_launch
    devices.is_interpreted = lambda backend: False


def pytest_runtest_setup(item):
    test_that_runs[0] = item.nodeid.partition("[")[0]


def pytest_terminal_summary(terminalreporter):
    for kernel, tests in sorted(variants.items()):
        terminalreporter.write_line(f"{len(tests):4} variants of {kernel}")
        for test in sorted({*tests.values()}):
            number = [*tests.values()].count(test)
            terminalreporter.write_line(f"     {number:4} first by {test}")
