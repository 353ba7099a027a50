// Sums of softmax probabilities by class as an operator of the CPU backend, and its derivative: of them the Dice loss
// is made, whose gradient at a pixel depends on the sums over all of them.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "arguments.h"
#include "jobs.h"
#include "kernels_cpu.h"
#include "plan.h"

namespace psf {
namespace {

template <class T>
Tensor class_sums_as(const Tensor& logits, const Tensor& labels, int64_t ignore_index, bool align_corners) {
  const int64_t images = logits.size(0), classes = logits.size(1), height = labels.size(1), width = labels.size(2);
  const MapTable<T> table(logits, height, width, align_corners);
  const BandTable<T> bands(table.rows());
  const int64_t items = images * bands.bands().count;
  std::vector<double> partial(items * 3 * classes);
  ClassSumsJob<T> job = {};
  job.frame = {images, classes, height, width, bands.bands()};
  job.logits = table.map(bands);
  job.labels = view_of(labels);
  job.ignore_index = ignore_index;
  job.partial = partial.data();
  run_items(items, kernels<T>().class_sums_scratch(job), kernels<T>().class_sums, job);

  std::vector<double> sums(3 * classes);
  for (int64_t item = 0; item < items; ++item) {
    for (int64_t i = 0; i < 3 * classes; ++i) sums[i] += partial[item * 3 * classes + i];
  }
  Tensor result = torch::stable::new_empty(logits, {3, classes}, kScalarType<T>);
  std::copy(sums.begin(), sums.end(), result.template mutable_data_ptr<T>());
  return result;
}

Tensor class_sums(const Tensor& logits, const Tensor& labels, int64_t ignore_index, bool align_corners) {
  check_class_sums(logits, labels);
  const auto run = is_float64(logits) ? class_sums_as<double> : class_sums_as<float>;
  return run(logits, labels, ignore_index, align_corners);
}

template <class T>
Tensor class_sums_backward_as(const Tensor& upstream, const Tensor& logits, const Tensor& labels, int64_t ignore_index,
                              bool align_corners) {
  const int64_t images = logits.size(0), classes = logits.size(1), height = labels.size(1), width = labels.size(2);
  const MapTable<T> table(logits, height, width, align_corners);
  const BandTable<T> bands(table.rows());
  const Tensor of_sums = torch::stable::contiguous(upstream);
  GradientTable<T> gradient(logits, table, bands, true);
  ClassSumsJob<T> job = {};
  job.frame = {images, classes, height, width, bands.bands()};
  job.logits = table.map(bands);
  job.labels = view_of(labels);
  job.ignore_index = ignore_index;
  job.of_overlap = of_sums.template const_data_ptr<T>();
  job.of_probability = job.of_overlap + classes;
  job.gradient = gradient.gradient();
  run_items(images * bands.bands().count, kernels<T>().class_sums_scratch(job), kernels<T>().class_sums, job);
  return gradient.finish();
}

Tensor class_sums_backward(const Tensor& upstream, const Tensor& logits, const Tensor& labels, int64_t ignore_index,
                           bool align_corners) {
  check_class_sums(logits, labels);
  const bool wide = is_float64(logits);
  STD_TORCH_CHECK(upstream.dim() == 2 && upstream.size(0) == 3 && upstream.size(1) == logits.size(1) &&
                      upstream.scalar_type() == (wide ? ScalarType::Double : ScalarType::Float),
                  "the gradient of the sums must be [3, C], of the dtype of the sums");
  const auto run = wide ? class_sums_backward_as<double> : class_sums_backward_as<float>;
  return run(upstream, logits, labels, ignore_index, align_corners);
}

}  // namespace
}  // namespace psf

STABLE_TORCH_LIBRARY_FRAGMENT(pseudoseg_fast, library) {
  library.def("class_sums(Tensor logits, Tensor labels, int ignore_index, bool align_corners) -> Tensor");
  library.def(
      "class_sums_backward(Tensor upstream, Tensor logits, Tensor labels, int ignore_index, bool align_corners) -> "
      "Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pseudoseg_fast, CPU, library) {
  library.impl("class_sums", TORCH_BOX(&psf::class_sums));
  library.impl("class_sums_backward", TORCH_BOX(&psf::class_sums_backward));
}
