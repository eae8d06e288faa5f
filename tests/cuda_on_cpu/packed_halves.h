// What cuda_bf16.h and cuda_fp16.h have in common: two numbers of 16 bits in a word, compared,
// counted and picked at once. Of a type with `float value() const` and `static from(float)`.
#pragma once

#include <cmath>
#include <cstdint>

namespace cuda_on_cpu {

template <typename T>
struct alignas(4) Two {
  T x, y;
};

template <typename T, typename F>
Two<T> each(Two<T> a, Two<T> b, F f) {
  return {f(a.x, b.x), f(a.y, b.y)};
}

// NaN only of two.
template <typename T>
T larger(T a, T b) {
  if (std::isnan(a.value())) return std::isnan(b.value()) ? T{0x7FFF} : b;
  if (std::isnan(b.value()) || a.value() > b.value()) return a;
  return b.value() > a.value() || std::signbit(a.value()) ? b : a;
}

template <typename T, typename F>
uint32_t mask(Two<T> a, Two<T> b, F holds) {
  return (holds(a.x.value(), b.x.value()) ? 0xFFFFu : 0u) |
         (holds(a.y.value(), b.y.value()) ? 0xFFFF0000u : 0u);
}

}  // namespace cuda_on_cpu

template <typename T>
cuda_on_cpu::Two<T> __hmax2(cuda_on_cpu::Two<T> a, cuda_on_cpu::Two<T> b) {
  return cuda_on_cpu::each(a, b, cuda_on_cpu::larger<T>);
}
template <typename T>
cuda_on_cpu::Two<T> __hadd2(cuda_on_cpu::Two<T> a, cuda_on_cpu::Two<T> b) {
  return cuda_on_cpu::each(a, b, [](T u, T v) { return T::from(u.value() + v.value()); });
}
template <typename T>
cuda_on_cpu::Two<T> __hge2(cuda_on_cpu::Two<T> a, cuda_on_cpu::Two<T> b) {
  return cuda_on_cpu::each(a, b, [](T u, T v) { return T::from(u.value() >= v.value()); });
}
template <typename T>
uint32_t __hge2_mask(cuda_on_cpu::Two<T> a, cuda_on_cpu::Two<T> b) {
  return cuda_on_cpu::mask(a, b, [](float u, float v) { return u >= v; });
}
template <typename T>
uint32_t __hlt2_mask(cuda_on_cpu::Two<T> a, cuda_on_cpu::Two<T> b) {
  return cuda_on_cpu::mask(a, b, [](float u, float v) { return u < v; });
}
