#include "corrupt_row.h"

namespace nar {

CorruptKernels corrupt_kernels_generic() { return {corrupt_row, write_rows}; }

}  // namespace nar
