// Reading strided tensors of any dtype, and dealing out a block's shared memory.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "work.cuh"

extern __shared__ double psf_shared_memory[];

namespace psf::cuda {

// Hands out pieces of the shared memory of a block. The host uses it without memory, to count.
class Shared {
 public:
  explicit PSF_HOST_DEVICE Shared(double* memory) : memory_(memory) {}

  template <class T>
  PSF_HOST_DEVICE T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(memory_ + used_);
    used_ += (count * int64_t(sizeof(T)) + 7) / 8;
    return piece;
  }
  PSF_HOST_DEVICE int64_t bytes() const { return 8 * used_; }

 private:
  double* memory_;
  int64_t used_ = 0;
};

// Call `use(read)` with read(i) = element i of a floating-point tensor as T. Without float64 tensors T is float.
template <class T, class Use>
__device__ inline void with_reader(const View& view, Use&& use) {
  const auto reader = [&](auto* data) { use([=](int64_t i) { return T(static_cast<float>(data[i])); }); };
  switch (view.dtype) {
    case Dtype::f16:
      return reader(static_cast<const c10::Half*>(view.data));
    case Dtype::bf16:
      return reader(static_cast<const c10::BFloat16*>(view.data));
    case Dtype::f64:
      if constexpr (sizeof(T) == 8) {
        const double* data = static_cast<const double*>(view.data);
        use([=](int64_t i) { return data[i]; });
      }
      return;
    default:
      return reader(static_cast<const float*>(view.data));
  }
}

// Element (b, y, x) of a tensor [B, H, W] of any dtype.
template <class T>
__device__ inline T read_pixel(const View& view, int64_t b, int y, int x) {
  const int64_t i = b * view.strides[0] + y * view.strides[2] + x * view.strides[3];
  switch (view.dtype) {
    case Dtype::u8:
      return T(static_cast<const uint8_t*>(view.data)[i]);
    case Dtype::i64:
      return T(static_cast<const int64_t*>(view.data)[i]);
    case Dtype::f16:
      return T(static_cast<float>(static_cast<const c10::Half*>(view.data)[i]));
    case Dtype::bf16:
      return T(static_cast<float>(static_cast<const c10::BFloat16*>(view.data)[i]));
    case Dtype::f64:
      return T(static_cast<const double*>(view.data)[i]);
    default:
      return T(static_cast<const float*>(view.data)[i]);
  }
}

// The class of a pixel in labels [B, H, W], u8 or i64; -1 where it is ignored or none of the classes.
__device__ inline int read_label(const View& labels, int64_t b, int y, int x, int64_t ignore_index, int classes) {
  const int64_t i = b * labels.strides[0] + y * labels.strides[2] + x * labels.strides[3];
  const int64_t label = labels.dtype == Dtype::u8 ? int64_t(static_cast<const uint8_t*>(labels.data)[i])
                                                  : static_cast<const int64_t*>(labels.data)[i];
  return label != ignore_index && label >= 0 && label < classes ? int(label) : -1;
}

}  // namespace psf::cuda
