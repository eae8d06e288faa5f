#include "nll/nll_row.h"

namespace nar {

NllRow nll_row_generic() { return nll_row; }

}  // namespace nar
