#include "unmask/unmask_row.h"

namespace nar {

UnmaskRow unmask_row_generic() { return unmask_row; }

}  // namespace nar
