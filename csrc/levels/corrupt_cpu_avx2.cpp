#include "corrupt/corrupt_row.h"
#include "corrupt/slots.h"

namespace nar {

CorruptKernels corrupt_kernels_avx2() {
  return {draw_times, ordered_starts, count_row, corrupt_row, write_rows};
}

}  // namespace nar
