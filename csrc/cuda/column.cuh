// One column of output pixels of an upsampled map, walked down row by row; each thread has some of its classes.
#pragma once

#include <type_traits>

#include "formulas.h"
#include "group.cuh"

namespace psf::cuda {

// 2^z and log2(x) of the special function units, within 2 units in the last place; subnormal results become zero.
__device__ inline float exp2_of(float z) {
#if defined(__CUDA_ARCH__)
  float e;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(z));
  return e;
#else
  return exp2f(z);
#endif
}
__device__ inline float log2_of(float x) {
#if defined(__CUDA_ARCH__)
  float z;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(z) : "f"(x));
  return z;
#else
  return log2f(x);
#endif
}
__device__ inline double exp2_of(double z) { return exp2(z); }
__device__ inline double log2_of(double x) { return log2(x); }

// Keeps the values at the nodes above and below, so that a pixel between them costs one multiplication and addition
// for each class.
template <class T>
class Column {
 public:
  __device__ Column(const Map<T>& map, int classes, const Group& group)
      : map_(map), classes_(classes), size_(group.size()), member_(group.member()) {}

  __device__ void begin(int64_t image, int x) {
    low_ = map_.columns.low[x];
    along_ = map_.columns.weight[x];
    factor_ = T(kLog2e) * (map_.factor ? map_.factor[image] : T(1));
    node_ = -1;
  }

  // Make value(k) those of output row y of the image.
  __device__ __forceinline__ void move_to(int64_t image, int y) {
    weight_ = map_.rows.weight[y];
    const int32_t node = map_.rows.low[y];
    if (node == node_) return;  // the same row for all threads of a block
    node_ = node;
    switch (map_.view.dtype) {
      case Dtype::f16:
        return load(image, static_cast<const c10::Half*>(map_.view.data));
      case Dtype::bf16:
        return load(image, static_cast<const c10::BFloat16*>(map_.view.data));
      case Dtype::f64:
        if constexpr (sizeof(T) == 8) load(image, static_cast<const double*>(map_.view.data));
        return;
      default:
        return load(image, static_cast<const float*>(map_.view.data));
    }
  }

  // Call f(k) for each of this thread's classes, and for up to one that is not there, which has value kAbsent.
  template <class F>
  __device__ __forceinline__ void each(F&& f) const {
#pragma unroll
    for (int k = 0; k < kSlots<T>; ++k) {
      if (k * size_ >= classes_) break;
      f(k);
    }
  }

  __device__ int class_of(int k) const { return k * size_ + member_; }
  __device__ bool has(int k) const { return class_of(k) < classes_; }
  __device__ T value(int k) const { return upper_[k] + weight_ * drop_[k]; }  // logit / ln 2
  __device__ T weight() const { return weight_; }

 private:
  static constexpr double kAbsent = -1e37;  // below every logit, yet a number

  template <class Stored>
  __device__ __forceinline__ void load(int64_t image, const Stored* data) {
    const int64_t* strides = map_.view.strides;
    data += image * strides[0] + member_ * strides[1] + node_ * strides[2] + low_ * strides[3];
    const int64_t right = along_ == T(0) ? 0 : strides[3], down = node_ + 1 < map_.rows.source ? strides[2] : 0;
#pragma unroll
    for (int k = 0; k < kSlots<T>; ++k, data += size_ * strides[1]) {
      if (k * size_ >= classes_) break;
      upper_[k] = T(kAbsent);
      drop_[k] = T(0);
      if (!has(k)) continue;
      const auto logit = [&](const Stored* at) {
        if constexpr (std::is_same_v<Stored, double>) return scaled_logit(T(*at), factor_);
        return scaled_logit(T(float(*at)), factor_);
      };
      upper_[k] = interpolate(logit(data), logit(data + right), along_);
      drop_[k] = interpolate(logit(data + down), logit(data + down + right), along_) - upper_[k];
    }
  }

  const Map<T>& map_;
  const int classes_, size_, member_;
  int32_t low_, node_;
  T along_, factor_, weight_;
  T upper_[kSlots<T>], drop_[kSlots<T>];
};

}  // namespace psf::cuda
