// Reading and writing strided tensors of any dtype.
#pragma once

#include "kernels_cpu.h"
#include "vec.h"

namespace psf::PSF_ISA {
namespace {

inline float from_half(uint16_t h) {
  const uint32_t magnitude = uint32_t(h & 0x7fff) << 13;
  uint32_t raw = bits<uint32_t>(bits<float>(magnitude) * 0x1p112f);
  raw |= magnitude >= 0x0f800000 ? 0x7f800000u : 0u;  // infinity and NaN
  return bits<float>(raw | uint32_t(h & 0x8000) << 16);
}

inline float from_bfloat16(uint16_t h) { return bits<float>(uint32_t(h) << 16); }

inline uint16_t to_half(float value) {
  const uint32_t raw = bits<uint32_t>(value), magnitude = raw & 0x7fffffff;
  uint32_t h;
  if (magnitude >= 0x47800000) {
    h = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  } else if (magnitude < 0x38800000) {  // subnormal: the addition rounds
    h = bits<uint32_t>(bits<float>(magnitude) + 0.5f) - 0x3f000000;
  } else {
    h = (magnitude + 0xc8000fff + (magnitude >> 13 & 1)) >> 13;
  }
  return uint16_t(h | (raw >> 16 & 0x8000));
}

inline uint16_t to_bfloat16(float value) {
  const uint32_t raw = bits<uint32_t>(value);
  return value == value ? uint16_t((raw + 0x7fff + (raw >> 16 & 1)) >> 16) : uint16_t(0x7fc0);
}

// Call `use(read)` with read(i) = element i of `from` as T, elements `stride` apart.
template <class T, class Use>
inline void with_reader(const void* from, Dtype dtype, int64_t stride, Use&& use) {
  switch (dtype) {
    case Dtype::f32:
      return use([=](int64_t i) { return T(static_cast<const float*>(from)[i * stride]); });
    case Dtype::f64:
      return use([=](int64_t i) { return T(static_cast<const double*>(from)[i * stride]); });
    case Dtype::f16:
      return use([=](int64_t i) { return T(from_half(static_cast<const uint16_t*>(from)[i * stride])); });
    case Dtype::bf16:
      return use([=](int64_t i) { return T(from_bfloat16(static_cast<const uint16_t*>(from)[i * stride])); });
    case Dtype::u8:
      return use([=](int64_t i) { return T(static_cast<const uint8_t*>(from)[i * stride]); });
    case Dtype::i64:
      return use([=](int64_t i) { return T(static_cast<const int64_t*>(from)[i * stride]); });
  }
}

// Copy n elements, converted, to `to`.
template <class T>
inline void load_row(const void* from, Dtype dtype, int64_t stride, int64_t n, T* to) {
  if (stride == 1) {  // a literal stride lets the compiler vectorise
    with_reader<T>(from, dtype, 1, [=](auto read) {
      for (int64_t i = 0; i < n; ++i) to[i] = read(i);
    });
  } else {
    with_reader<T>(from, dtype, stride, [=](auto read) {
      for (int64_t i = 0; i < n; ++i) to[i] = read(i);
    });
  }
}

template <class T>
inline void store_row(void* to, Dtype dtype, const T* from, int64_t n) {
  switch (dtype) {
    case Dtype::f16:
      for (int64_t i = 0; i < n; ++i) static_cast<uint16_t*>(to)[i] = to_half(float(from[i]));
      return;
    case Dtype::bf16:
      for (int64_t i = 0; i < n; ++i) static_cast<uint16_t*>(to)[i] = to_bfloat16(float(from[i]));
      return;
    case Dtype::f64:
      for (int64_t i = 0; i < n; ++i) static_cast<double*>(to)[i] = double(from[i]);
      return;
    default:
      for (int64_t i = 0; i < n; ++i) static_cast<float*>(to)[i] = float(from[i]);
  }
}

// Where an element of a view lies.
inline const char* element(const View& view, int64_t b, int64_t c, int64_t y, int64_t x) {
  const int64_t size = view.dtype == Dtype::f64 || view.dtype == Dtype::i64    ? 8
                       : view.dtype == Dtype::f32                              ? 4
                       : view.dtype == Dtype::f16 || view.dtype == Dtype::bf16 ? 2
                                                                               : 1;
  const int64_t* s = view.strides;
  return static_cast<const char*>(view.data) + (b * s[0] + c * s[1] + y * s[2] + x * s[3]) * size;
}

// n elements of a row from (b, c, y, x) on; zero in the lanes behind them.
template <class T>
inline Vec<T> load_pixels(const View& view, int64_t b, int64_t c, int64_t y, int64_t x, int64_t n) {
  Vec<T> v = {};
  load_row(element(view, b, c, y, x), view.dtype, view.strides[3], n, reinterpret_cast<T*>(&v));
  return v;
}

// Call use(i, label) for those of n pixels of a map of labels from (b, y, x) on that count: whose label is neither
// ignored nor outside [0, classes).
template <class T, class Use>
inline void for_labels(const View& view, int64_t ignore_index, int64_t classes, int64_t b, int64_t y, int64_t x,
                       int64_t n, Use&& use) {
  int64_t labels[kLanes<T>] = {};
  load_row(element(view, b, 0, y, x), view.dtype, view.strides[3], n, labels);
  for (int64_t i = 0; i < n; ++i) {
    if (labels[i] != ignore_index && labels[i] >= 0 && labels[i] < classes) use(i, labels[i]);
  }
}

}  // namespace
}  // namespace psf::PSF_ISA
