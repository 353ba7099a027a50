// Stands in for CUDA's runtime, so that a C++ compiler builds the kernels of csrc/cuda and a processor runs them.
//
// The threads of a block are fibers of one thread: each runs until it waits for the others. Blocks run one after the
// other, hence one copy of the shared memory is enough. Warps wait for all their 32 threads in a shuffle, so a kernel
// that shuffles where threads have parted never ends: `run_block` says so instead.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaError_t = int;
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

extern dim3 blockIdx, gridDim;

namespace cuda_shim {

extern unsigned thread;  // the one that runs

// Run a kernel for each thread of a block, with this many bytes of shared memory, which starts as noise.
void run_block(unsigned threads, size_t shared_bytes, const std::function<void()>& kernel);
void wait_for_block();
// Wait for the warp with `value` given away; return the slots of its 32 threads.
const uint64_t* exchange(uint64_t value);

struct ThreadIndex {
  struct X {
    operator unsigned() const { return thread; }
  } x;
};

}  // namespace cuda_shim

inline const cuda_shim::ThreadIndex threadIdx;

inline void __syncthreads() { cuda_shim::wait_for_block(); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int offset) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  (void)mask;
  uint64_t raw = 0;
  __builtin_memcpy(&raw, &value, sizeof value);
  raw = cuda_shim::exchange(raw)[(cuda_shim::thread % 32) ^ unsigned(offset)];
  __builtin_memcpy(&value, &raw, sizeof value);
  return value;
}

template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
using std::sqrt;

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  gridDim = config->gridDim;
  for (unsigned y = 0; y < config->gridDim.y; ++y) {
    for (unsigned x = 0; x < config->gridDim.x; ++x) {
      blockIdx = dim3(x, y);
      cuda_shim::run_block(config->blockDim.x, config->dynamicSmemBytes, [&] { kernel(arguments...); });
    }
  }
  return 0;
}
