// Tensors and options as the structs of kernels_cpu.h, and the bands of a job on torch's threads.
// Include this only from sources compiled for the baseline.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "arguments.h"
#include "isa.h"
#include "kernels_cpu.h"
#include "plan.h"

namespace psf {

template <class T>
const Kernels<T>& kernels() {
  const auto pick = [](const auto& f32, const auto& f64) -> const Kernels<T>& {
    if constexpr (sizeof(T) == 4) {
      return f32();
    } else {
      return f64();
    }
  };
#if defined(__x86_64__)
  switch (isa_in_use()) {
    case Isa::avx512:
      return pick(avx512::f32, avx512::f64);
    case Isa::avx2:
      return pick(avx2::f32, avx2::f64);
    case Isa::baseline:
      break;
  }
#endif
  return pick(baseline::f32, baseline::f64);
}

// The tables behind the struct Map.
template <class T>
class MapTable {
 public:
  MapTable(const Tensor& logits, int64_t height, int64_t width, bool align_corners)
      : view_(view_of(logits)),
        rows_(logits.size(2), height, align_corners),
        columns_(logits.size(3), width, align_corners),
        factor_(logits.size(0), T(1)) {}

  Map<T> map(const BandTable<T>& bands) const {
    return {view_, rows(), columns(), factor_.data(), bands.max_rows(rows())};
  }
  const Axis<T>& rows() const { return rows_.axis(); }
  const Axis<T>& columns() const { return columns_.axis(); }
  std::vector<T>& factor() { return factor_; }

 private:
  View view_;
  AxisTable<T> rows_, columns_;
  std::vector<T> factor_;
};

// Do items [0, count) with a kernel on torch's threads, each thread with scratch memory of its own.
template <class Job>
void run_items(int64_t count, int64_t scratch, void (*kernel)(const Job&, int64_t, void*), const Job& job) {
  struct Free {
    void operator()(void* memory) const { ::operator delete(memory, std::align_val_t(64)); }
  };
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<void, Free> memory(::operator new(size_t(scratch), std::align_val_t(64)));
    for (int64_t item = begin; item < end; ++item) kernel(job, item, memory.get());
  });
}

// Mean of squares of each image's map at the output size, without the map: [B] float64.
template <class T>
std::vector<double> mean_squares(const Tensor& logits, const MapTable<T>& table) {
  const int64_t images = logits.size(0), classes = logits.size(1);
  const GramTable<T> rows(table.rows()), columns(table.columns());
  const SquareJob<T> job = {view_of(logits),   logits.size(2),          logits.size(3),      rows.diagonal.data(),
                            rows.pairs.data(), columns.diagonal.data(), columns.pairs.data()};
  std::vector<double> sums(images * classes), means(images);
  torch::stable::parallel_for(0, images * classes, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> scratch(2 * (logits.size(3) + 2 * kPadding));
    for (int64_t i = begin; i < end; ++i) {
      sums[i] = kernels<T>().square_sum(job, i / classes, i % classes, scratch.data());
    }
  });
  const double elements = double(classes) * double(table.rows().target) * double(table.columns().target);
  for (int64_t b = 0; b < images; ++b) {
    for (int64_t c = 0; c < classes; ++c) means[b] += sums[b * classes + c];
    means[b] /= elements;
  }
  return means;
}

// The tables behind the struct Fusion.
template <class T>
class FusionTable {
 public:
  FusionTable(const Tensor& decoder, const Tensor& cam, int64_t height, int64_t width, const FusionOptions& options)
      : options_(options),
        decoder_(decoder, height, width, options.align_corners),
        cam_(cam, height, width, options.align_corners) {
    if (options.norm != kBatch && options.norm != kImage) return;
    std::vector<double> squares = mean_squares<T>(decoder, decoder_);
    const std::vector<double> of_cam = mean_squares<T>(cam, cam_);
    double sum = 0;
    for (size_t b = 0; b < squares.size(); ++b) sum += squares[b] = (squares[b] + of_cam[b]) / 2;
    for (size_t b = 0; b < squares.size(); ++b) {
      const double square = options.norm == kBatch ? sum / double(squares.size()) : squares[b];
      decoder_.factor()[b] = cam_.factor()[b] = T(1 / std::sqrt(square + options.norm_eps));
    }
  }

  Fusion<T> fusion(const BandTable<T>& bands) const {
    return {decoder_.map(bands),
            cam_.map(bands),
            T(options_.gamma),
            T(1 / options_.temperature),
            options_.temperature == 1.0   ? Power::one
            : options_.temperature == 0.5 ? Power::square
                                          : Power::any,
            options_.norm == kPixel,
            T(options_.norm_eps)};
  }
  const Axis<T>& rows() const { return decoder_.rows(); }

 private:
  FusionOptions options_;
  MapTable<T> decoder_, cam_;
};

}  // namespace psf
