// The threads that share a pixel: which pixel, which of its classes, and sums over them.
#pragma once

#include "memory.cuh"

namespace psf::cuda {

// A power of two threads share a pixel; member m has the classes m, m + size, ... of it. Neighbouring threads of a warp
// have neighbouring pixels, so that their reads of one class lie together. A block has a step of kThreads / size
// pixels.
//
// Reductions hand the same bits to all members. They must be called by all threads of a block.
class Group {
 public:
  // Take the shared memory of a group; on the host, count it.
  PSF_HOST_DEVICE static double* reserve(Shared& shared) { return shared.take<double>(kExchanged * kWarps); }

  __device__ Group(int size, Shared& shared) : size_(size), exchange_(reserve(shared)) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (size <= 32) {
      const int pixels = 32 / size;
      place_ = warp * pixels + lane % pixels;
      member_ = lane / pixels;
    } else {
      place_ = int(threadIdx.x) / size;
      member_ = int(threadIdx.x) % size;
    }
  }

  __device__ int size() const { return size_; }
  __device__ int step() const { return kThreads / size_; }
  __device__ int place() const { return place_; }
  __device__ int member() const { return member_; }

  template <class T, int n>
  __device__ __forceinline__ void sum(T (&values)[n]) const {
    reduce(values, [](T& a, T b) { a += b; });
  }

  template <class T, int n>
  __device__ __forceinline__ void max(T (&values)[n]) const {
    reduce(values, [](T& a, T b) { a = b > a ? b : a; });
  }

  // The largest value and its class; of equal values the first class wins.
  template <class T>
  __device__ __forceinline__ void best(T& value, int& index) const {
    struct Best {
      T value;
      int index;
    };
    const auto better = [](Best& a, Best b) {
      if (b.value > a.value || (b.value == a.value && b.index < a.index)) a = b;
    };
    Best best = {value, index};
    for (int offset = 16; offset >= nearest(); offset >>= 1) {
      better(best, {__shfl_xor_sync(~0u, best.value, offset), __shfl_xor_sync(~0u, best.index, offset)});
    }
    if (size_ > 32) {
      T* const values = reinterpret_cast<T*>(exchange_);
      int* const indices = reinterpret_cast<int*>(exchange_ + kWarps);
      __syncthreads();
      values[threadIdx.x / 32] = best.value;
      indices[threadIdx.x / 32] = best.index;
      __syncthreads();
      const int first = first_warp();
      best = {values[first], indices[first]};
      for (int i = first + 1; i < first + size_ / 32; ++i) better(best, {values[i], indices[i]});
    }
    value = best.value;
    index = best.index;
  }

 private:
  static constexpr int kExchanged = 3;

  __device__ int nearest() const { return size_ < 32 ? 32 / size_ : 1; }  // distance of members next to each other
  __device__ int first_warp() const { return int(threadIdx.x) / size_ * (size_ / 32); }

  template <class T, int n, class Combine>
  __device__ __forceinline__ void reduce(T (&values)[n], Combine combine) const {
    static_assert(n <= kExchanged);
    for (int offset = 16; offset >= nearest(); offset >>= 1) {
#pragma unroll
      for (int i = 0; i < n; ++i) combine(values[i], __shfl_xor_sync(~0u, values[i], offset));
    }
    if (size_ <= 32) return;
    T* const exchange = reinterpret_cast<T*>(exchange_);
    __syncthreads();
    for (int i = 0; i < n; ++i) exchange[i * kWarps + int(threadIdx.x) / 32] = values[i];
    __syncthreads();
    for (int i = 0; i < n; ++i) {
      values[i] = exchange[i * kWarps + first_warp()];
      for (int k = 1; k < size_ / 32; ++k) combine(values[i], exchange[i * kWarps + first_warp() + k]);
    }
  }

  const int size_;
  double* const exchange_;
  int place_, member_;
};

// Sum `value` over the threads of a block, in a fixed order, for all of them.
__device__ inline double block_sum(double value, double* exchange) {  // [kWarps]
  for (int offset = 16; offset > 0; offset >>= 1) value += __shfl_xor_sync(~0u, value, offset);
  if (threadIdx.x % 32 == 0) exchange[threadIdx.x / 32] = value;
  __syncthreads();
  value = 0;
  for (int i = 0; i < kWarps; ++i) value += exchange[i];
  __syncthreads();
  return value;
}

}  // namespace psf::cuda
