#include "linear/linear_panel.h"

namespace nar {

LinearKernel linear_avx512() { return {kPanelRows, pack, multiply}; }

}  // namespace nar
