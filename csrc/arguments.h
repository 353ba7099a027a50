// The operators' arguments, checked and described for the kernels: what the CPU and the CUDA operators share.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "tensors.h"

namespace psf {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum Norm : int64_t { kBatch, kImage, kPixel, kOff };

using LossResult = std::tuple<Tensor, Tensor, Tensor>;

enum Reduction : int64_t { kMean, kSum, kNone };

template <class T>
constexpr ScalarType kScalarType = sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double;

struct FusionOptions {
  double gamma, temperature;
  int64_t norm;
  double norm_eps;
  bool align_corners;
};

inline Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::Double:
      return Dtype::f64;
    case ScalarType::Half:
      return Dtype::f16;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Bool:
    case ScalarType::Byte:
      return Dtype::u8;
    case ScalarType::Long:
      return Dtype::i64;
    default:
      STD_TORCH_CHECK(false, "expected float32, float64, float16, bfloat16, bool, uint8 or int64");
  }
}

inline bool is_float64(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::Double; }

// A tensor [B, C, H, W] or [B, H, W].
inline View view_of(const Tensor& tensor) {
  const bool has_classes = tensor.dim() == 4;
  return {tensor.const_data_ptr(),
          dtype_of(tensor),
          {tensor.stride(0), has_classes ? tensor.stride(1) : 0, tensor.stride(tensor.dim() - 2),
           tensor.stride(tensor.dim() - 1)}};
}

inline View view_of(const std::optional<Tensor>& tensor) { return tensor ? view_of(*tensor) : View{}; }

inline void check_map(const Tensor& map, const char* name) {
  STD_TORCH_CHECK(map.dim() == 4 && map.size(1) > 0 && map.size(2) > 0 && map.size(3) > 0, name,
                  " must be [B, C, h, w] with classes and pixels");
  STD_TORCH_CHECK(dtype_of(map) != Dtype::u8 && dtype_of(map) != Dtype::i64, name, " must be floating point");
}

inline void check_same_classes(const Tensor& a, const Tensor& b) {
  STD_TORCH_CHECK(a.size(0) == b.size(0) && a.size(1) == b.size(1), "maps must agree in images and classes");
}

inline void check_pixels(const std::optional<Tensor>& tensor, const char* name, int64_t images, int64_t height,
                         int64_t width) {
  STD_TORCH_CHECK(!tensor || (tensor->dim() == 3 && tensor->size(0) == images && tensor->size(1) == height &&
                              tensor->size(2) == width),
                  name, " must be [B, H, W] of the output size");
}

inline void check_soft_cross_entropy(const Tensor& logits, const std::optional<Tensor>& upstream, const Tensor& target,
                                     const std::optional<Tensor>& weight) {
  check_map(logits, "logits");
  check_map(target, "target");
  check_same_classes(logits, target);
  check_pixels(weight, "weight", target.size(0), target.size(2), target.size(3));
  check_pixels(upstream, "upstream", target.size(0), target.size(2), target.size(3));
}

inline void check_labels(const Tensor& logits, const Tensor& labels) {
  const Dtype dtype = dtype_of(labels);
  STD_TORCH_CHECK(labels.dim() == 3 && labels.size(0) == logits.size(0) && labels.size(1) > 0 && labels.size(2) > 0 &&
                      (dtype == Dtype::u8 || dtype == Dtype::i64),
                  "labels must be [B, H, W], uint8 or int64");
}

inline void check_cross_entropy(const Tensor& logits, const std::optional<Tensor>& upstream, const Tensor& labels,
                                const std::optional<Tensor>& class_weight) {
  check_map(logits, "logits");
  check_labels(logits, labels);
  STD_TORCH_CHECK(!class_weight || (class_weight->dim() == 1 && class_weight->size(0) == logits.size(1)),
                  "class_weight must be [C]");
  check_pixels(upstream, "upstream", labels.size(0), labels.size(1), labels.size(2));
}

inline void check_class_sums(const Tensor& logits, const Tensor& labels) {
  check_map(logits, "logits");
  check_labels(logits, labels);
}

inline void check_class_sums_backward(const Tensor& upstream, const Tensor& logits, const Tensor& labels) {
  check_class_sums(logits, labels);
  STD_TORCH_CHECK(upstream.dim() == 2 && upstream.size(0) == 3 && upstream.size(1) == logits.size(1) &&
                      upstream.scalar_type() == (is_float64(logits) ? ScalarType::Double : ScalarType::Float),
                  "the gradient of the sums must be [3, C], of the dtype of the sums");
}

inline void check_consistency_loss(const Tensor& student, const std::optional<Tensor>& upstream, const Tensor& decoder,
                                   const Tensor& cam, const std::optional<Tensor>& valid, int64_t height,
                                   int64_t width) {
  check_map(student, "student_logits");
  check_map(decoder, "decoder_logits");
  check_map(cam, "cam_logits");
  check_same_classes(student, decoder);
  check_same_classes(student, cam);
  STD_TORCH_CHECK(height > 0 && width > 0, "size must be at least 1 x 1");
  check_pixels(valid, "valid", student.size(0), height, width);
  check_pixels(upstream, "upstream", student.size(0), height, width);
}

inline void check_predict_labels(const Tensor& logits, int64_t height, int64_t width) {
  check_map(logits, "logits");
  STD_TORCH_CHECK(height > 0 && width > 0, "size must be at least 1 x 1");
}

}  // namespace psf
