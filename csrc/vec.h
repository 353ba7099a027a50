// Vectors as wide as the instruction set and their few mathematical functions.
// Included by kernels_cpu.cpp only: everything here has internal linkage in the namespace of the instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace psf::PSF_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

template <class T>
struct Simd;
template <>
struct Simd<float> {
  typedef float Vec __attribute__((vector_size(kBytes)));
  typedef int32_t Int __attribute__((vector_size(kBytes)));
  using Lane = int32_t;
};
template <>
struct Simd<double> {
  typedef double Vec __attribute__((vector_size(kBytes)));
  typedef int64_t Int __attribute__((vector_size(kBytes)));
  using Lane = int64_t;
};
template <class T>
using Vec = typename Simd<T>::Vec;
template <class T>
using Int = typename Simd<T>::Int;
template <class T>
constexpr int kLanes = kBytes / int(sizeof(T));

template <class T>
inline Vec<T> splat(T value) {
  return value - Vec<T>{};
}

template <class T>
inline Vec<T> load(const T* from) {
  Vec<T> v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

template <class T>
inline void store(T* to, Vec<T> v) {
  __builtin_memcpy(to, &v, sizeof v);
}

template <class V>
inline V max(V a, V b) {
  return a > b ? a : b;
}

template <class To, class From>
inline To bits(From from) {
  To to;
  static_assert(sizeof to == sizeof from);
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

// 2^z for z in [-126, 127], relative error below 2e-7; NaN stays NaN. With f = z - round(z) in [-1/2, 1/2], 2^f is its
// minimax polynomial of degree 5.
inline Vec<float> exp2_within(Vec<float> z) {
  const auto polynomial = [](Vec<float> f) {
    Vec<float> p = f * 1.326472690e-3f + 9.671512661e-3f;
    p = p * f + 5.550733744e-2f;
    p = p * f + 2.402224208e-1f;
    p = p * f + 6.931469776e-1f;
    return p * f + 1.f;
  };
#if defined(__AVX512F__)
  const Vec<float> f = Vec<float>(_mm512_maskz_reduce_ps(0xffff, __m512(z), _MM_FROUND_TO_NEAREST_INT));
  return Vec<float>(_mm512_maskz_scalef_ps(0xffff, __m512(polynomial(f)), __m512(z - f)));
#else
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const Vec<float> shifted = z + kRound;
  const Int<float> exponent = (bits<Int<float>>(shifted) << 23) + 0x3f800000;
  return polynomial(z - (shifted - kRound)) * bits<Vec<float>>(exponent);
#endif
}

// The same for any z, 2^-126 below -126.
inline Vec<float> exp2(Vec<float> z) { return exp2_within(z < -126.f ? splat(-126.f) : z); }

// log2(x) for positive normal x, and -126 or less for zero and subnormal x; NaN stays NaN.
inline Vec<float> log2(Vec<float> x) {
  const Vec<float> positive = x < 1.17549435e-38f ? splat(1.17549435e-38f) : x;
  const Int<float> raw = bits<Int<float>>(positive);
  const Int<float> exponent = (raw - 0x3f3504f3) >> 23;  // the mantissa lies in [sqrt(1/2), sqrt(2))
  const Vec<float> m = bits<Vec<float>>(raw - (exponent << 23));
  const Vec<float> t = (m - 1.f) / (m + 1.f);
  const Vec<float> s = t * t;
  Vec<float> p = splat(2.885390082f / 9);
  p = p * s + 2.885390082f / 7;
  p = p * s + 2.885390082f / 5;
  p = p * s + 2.885390082f / 3;
  p = p * s + 2.885390082f;
  const Vec<float> value = p * t + __builtin_convertvector(exponent, Vec<float>);
  return x == x ? value : x;
}

// float64 exists for gradient checks: exact rather than fast.
inline Vec<double> exp2(Vec<double> z) {
  for (int i = 0; i < kLanes<double>; ++i) {
    z[i] = __builtin_exp2(z[i] < -1000. ? -1000. : z[i]);
  }
  return z;
}

inline Vec<double> exp2_within(Vec<double> z) { return exp2(z); }

inline Vec<double> log2(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) {
    x[i] = __builtin_log2(x[i] < 2.3e-308 ? 2.3e-308 : x[i]);
  }
  return x;
}

template <class T>
inline Vec<T> rsqrt(Vec<T> x) {
  for (int i = 0; i < kLanes<T>; ++i) {
    x[i] = T(1) / __builtin_sqrt(x[i]);
  }
  return x;
}

// Results below 2^-126 become zero while this lives: subnormal arithmetic costs a hundred times more.
class FlushSubnormals {
 public:
#if defined(__x86_64__)
  FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8000); }
  ~FlushSubnormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
  FlushSubnormals() {}
#endif
};

}  // namespace
}  // namespace psf::PSF_ISA
