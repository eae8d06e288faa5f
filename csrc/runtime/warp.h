// What all kernels say of a warp.
#pragma once

#include <cstdint>

namespace nar {

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = 0xFFFFFFFF;

}  // namespace nar
