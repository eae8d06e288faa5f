#include "nll/nll_row.h"

namespace nar {

NllRow nll_row_avx512() { return nll_row; }

}  // namespace nar
