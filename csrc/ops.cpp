// Operator schemas, argument checks and the choice of instruction set for the CPU backend.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "isa.h"
#include "kernels_cpu.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The tridiagonal matrix W'W of one axis, W being the bilinear matrix [out, in].
struct Gram {
  std::vector<float> diagonal, pairs;

  Gram(int64_t in, int64_t out, bool align_corners) : diagonal(in), pairs(in) {
    std::vector<double> d(in), p(in);
    const double scale = align_corners ? (out > 1 ? double(in - 1) / double(out - 1) : 0.0) : double(in) / double(out);
    for (int64_t i = 0; i < out; ++i) {
      const double at = align_corners ? i * scale : std::max(0.0, (i + 0.5) * scale - 0.5);
      const int64_t low = std::min<int64_t>(int64_t(at), in - 1);
      const double high_weight = low + 1 < in ? at - double(low) : 0.0;
      d[low] += (1 - high_weight) * (1 - high_weight);
      if (low + 1 < in) {
        d[low + 1] += high_weight * high_weight;
        p[low] += high_weight * (1 - high_weight);
      }
    }
    std::copy(d.begin(), d.end(), diagonal.begin());
    std::copy(p.begin(), p.end(), pairs.begin());
  }
};

auto square_sum_kernel() {
#if defined(__x86_64__)
  switch (psf::isa_in_use()) {
    case psf::Isa::avx512:
      return &psf::avx512::upsampled_square_sum;
    case psf::Isa::avx2:
      return &psf::avx2::upsampled_square_sum;
    case psf::Isa::baseline:
      break;
  }
#endif
  return &psf::baseline::upsampled_square_sum;
}

// logits [B, C, h, w] float32 -> [B], the mean square of each image's map upsampled to [C, height, width].
Tensor mean_square(const Tensor& logits, int64_t height, int64_t width, bool align_corners) {
  STD_TORCH_CHECK(logits.dim() == 4 && logits.scalar_type() == ScalarType::Float, "expected float32 logits [B,C,h,w]");
  const int64_t batch = logits.size(0), channels = logits.size(1), h = logits.size(2), w = logits.size(3);
  STD_TORCH_CHECK(channels > 0 && h > 0 && w > 0 && height > 0 && width > 0, "expected no empty map");
  const Tensor dense = torch::stable::contiguous(logits);
  Tensor result = torch::stable::new_empty(logits, {batch});
  const Gram rows(h, height, align_corners), columns(w, width, align_corners);
  const auto square_sum = square_sum_kernel();
  const float* maps = dense.const_data_ptr<float>();
  float* means = result.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      double sum = 0;
      for (int64_t c = 0; c < channels; ++c) {
        sum += square_sum(maps + (b * channels + c) * h * w, h, w, rows.diagonal.data(), rows.pairs.data(),
                          columns.diagonal.data(), columns.pairs.data());
      }
      means[b] = float(sum / (double(channels) * double(height) * double(width)));
    }
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY(pseudoseg_fast, library) {
  library.def("mean_square(Tensor logits, int height, int width, bool align_corners) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pseudoseg_fast, CPU, library) {
  library.impl("mean_square", TORCH_BOX(&mean_square));
}
