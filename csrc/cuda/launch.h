// The device and stream of a tensor, and launches on them.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <string>

#include "work.cuh"

namespace psf::cuda {

// Makes the tensor's device the current one while this lives; launches go to torch's current stream of that device.
class Launcher {
 public:
  explicit Launcher(const torch::stable::Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  // Run blocks of kThreads threads; nothing if there are none.
  template <class Work>
  void operator()(void (*kernel)(Work), int64_t x, int64_t y, int64_t shared_bytes, const Work& work) const {
    if (x == 0 || y == 0) return;
    STD_TORCH_CHECK(x <= kMost && y <= kMostAcross, "a map is too large for one launch: ", x, " x ", y, " blocks");
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(x), unsigned(y));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = size_t(shared_bytes);
    config.stream = stream_;
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, work));
  }

 private:
  static constexpr int64_t kMost = (int64_t(1) << 31) - 1, kMostAcross = (1 << 16) - 1;

  const torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace psf::cuda
