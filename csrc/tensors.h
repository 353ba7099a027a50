// What all kernels, on the CPU and in CUDA, are told about tensors and labels. The structs own nothing.
#pragma once

#include <cstdint>

namespace psf {

enum class Dtype { f32, f64, f16, bf16, u8, i64 };

// A strided tensor [B, C, H, W]; without C its stride is 0. `data` is null where no tensor is given.
struct View {
  const void* data;
  Dtype dtype;
  int64_t strides[4];
};

// Where the label of a loss comes from: given probabilities, given classes, or two maps; or no loss, but the gradient
// that comes back from sums of probabilities by class.
enum class Label { target, classes, fused, sums };

// How a fused label is sharpened: y^(1 / temperature), with 1 and 0.5 apart.
enum class Power { one, square, any };

}  // namespace psf
