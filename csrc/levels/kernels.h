// The kernels of every operation, compiled once per instruction set and chosen at run time.
//
// All that the files of this folder compile must be local to them: in an anonymous namespace, and
// standard containers only of types that are. Of an inline function that several files share the
// linker keeps one copy, maybe one that this CPU cannot run.
#pragma once

#include "choose/choose.h"
#include "corrupt/corrupt_cpu.h"
#include "linear/linear.h"
#include "mask_tokens/mask_tokens.h"
#include "nll/nll.h"
#include "scan/scan.h"
#include "unmask/unmask.h"

namespace nar {

struct Kernels {
  CorruptKernels corrupt;
  NllRow nll_row;
  UnmaskRow unmask_row;
  ChooseRow choose_row;
  MaskTokensRows mask_tokens_rows;
  ScanBlock scan_block;
  LinearKernel linear;  // null without fused multiply-adds
};

// One a file of this folder. Constants: no code of theirs runs when the library is loaded.
extern const Kernels kGenericKernels, kAvx2Kernels, kAvx512Kernels;

// Those of the best level of this CPU, or of a lower one after limit_simd.
const Kernels& kernels();

}  // namespace nar
