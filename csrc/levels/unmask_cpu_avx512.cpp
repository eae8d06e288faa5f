#include "unmask/unmask_row.h"

namespace nar {

UnmaskRow unmask_row_avx512() { return unmask_row; }

}  // namespace nar
