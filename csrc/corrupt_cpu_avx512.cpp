#include "corrupt_row.h"

namespace nar {

CorruptKernels corrupt_kernels_avx512() { return {corrupt_row, write_rows}; }

}  // namespace nar
