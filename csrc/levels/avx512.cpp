// Every kernel for AVX-512: setup.py compiles this file, and no other, with its flags.
#include "choose/choose_row.h"
#include "corrupt/corrupt_row.h"
#include "corrupt/slots.h"
#include "levels/kernels.h"
#include "linear/linear_panel.h"
#include "mask_tokens/mask_tokens_row.h"
#include "nll/nll_row.h"
#include "scan/scan_block.h"
#include "unmask/unmask_row.h"

namespace nar {

constexpr Kernels kAvx512Kernels = {
    {draw_times, ordered_starts, count_blocks, count_row, corrupt_row, write_rows},
    nll_row,
    unmask_row,
    choose_row,
    mask_tokens_rows,
    scan_block,
    {kPanelRows, pack, multiply},
};

}  // namespace nar
