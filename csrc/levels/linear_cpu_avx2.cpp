#include "linear/linear_panel.h"

namespace nar {

LinearKernel linear_avx2() { return {kPanelRows, pack, multiply}; }

}  // namespace nar
