// Operators of the CPU backend: schemas, checks, jobs and their bands on torch's threads.
//
// `loss` operators return (loss, denominator, gradient): the mean divides by the denominator, and the gradient of the
// undivided sum with respect to the logits comes along when `gradient` asks for it, at the low resolution. Backward
// only scales it. For the unreduced loss backward calls the operator again with `upstream`, its gradient. The Dice
// loss, whose gradient at a pixel depends on sums over all of them, is made of an operator for these sums and of its
// backward.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "arguments.h"
#include "jobs.h"
#include "kernels_cpu.h"
#include "plan.h"

namespace psf {
namespace {

// Ask for huge pages behind a large result that was just allocated: a fresh page fault for every 4 KiB takes longer
// than filling it.
void advise_huge_pages(const Tensor& tensor, int64_t bytes) {
#if defined(__linux__)
  constexpr int64_t kLarge = int64_t(1) << 24, kPage = 4096;
  if (bytes < kLarge) return;
  const auto begin = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
  madvise(reinterpret_cast<void*>(first), (begin + size_t(bytes) - first) / kPage * kPage, MADV_HUGEPAGE);
#endif
}

// Run a loss whose label, weight and upstream gradient `job` already holds.
template <class T>
LossResult run_loss(LossJob<T>& job, const Tensor& student, const MapTable<T>& table, const BandTable<T>& bands,
                    int64_t reduction, bool with_gradient) {
  const int64_t images = student.size(0), classes = student.size(1), nodes = student.size(3);
  const int64_t height = table.rows().target, width = table.columns().target;
  const int64_t items = images * bands.bands().count;
  const FoldTable<T> fold(table.columns());
  std::vector<double> partial(2 * items);
  job.student = table.map(bands);
  const bool overlaps = with_gradient && !job.student.same();
  std::vector<T> overlap(overlaps ? items * classes * nodes : 0);
  Tensor gradient = with_gradient
                        ? torch::stable::new_empty(student, {images, classes, student.size(2), nodes}, kScalarType<T>)
                        : torch::stable::new_empty(student, {0}, kScalarType<T>);
  Tensor loss = reduction == kNone ? torch::stable::new_empty(student, {images, height, width}, kScalarType<T>)
                                   : torch::stable::new_empty(student, {}, kScalarType<T>);
  Tensor denominator = torch::stable::new_empty(student, {}, kScalarType<T>);

  job.frame = {images, classes, height, width, bands.bands()};
  job.loss = reduction == kNone ? loss.template mutable_data_ptr<T>() : nullptr;
  job.gradient = with_gradient ? gradient.template mutable_data_ptr<T>() : nullptr;
  job.overlap = overlap.data();
  job.partial = partial.data();
  job.fold = fold.fold();
  run_items(items, kernels<T>().loss_scratch(job), kernels<T>().loss, job);

  double sum = 0, weight = 0;
  for (int64_t item = 0; item < items; ++item) {
    sum += partial[2 * item];
    weight += partial[2 * item + 1];
    const int64_t image = item / bands.bands().count, band = item % bands.bands().count;
    const int64_t node = bands.bands().node[band + 1];
    if (!overlaps || node == student.size(2)) continue;
    for (int64_t c = 0; c < classes; ++c) {
      T* row = job.gradient + ((image * classes + c) * student.size(2) + node) * nodes;
      const T* more = overlap.data() + (item * classes + c) * nodes;
      for (int64_t x = 0; x < nodes; ++x) row[x] += more[x];
    }
  }
  const double divisor = reduction == kMean && weight > 0 ? weight : 1.0;
  *denominator.template mutable_data_ptr<T>() = T(divisor);
  if (reduction != kNone) *loss.template mutable_data_ptr<T>() = T(sum / divisor);
  return {loss, denominator, gradient};
}

template <class T>
LossResult soft_cross_entropy_as(const Tensor& logits, const std::optional<Tensor>& upstream, const Tensor& target,
                                 const std::optional<Tensor>& weight, int64_t reduction, bool align_corners,
                                 bool gradient) {
  const MapTable<T> table(logits, target.size(2), target.size(3), align_corners);
  const BandTable<T> bands(table.rows());
  LossJob<T> job = {};
  job.label = Label::target;
  job.target = view_of(target);
  job.weight = view_of(weight);
  job.upstream = view_of(upstream);
  return run_loss(job, logits, table, bands, reduction, gradient);
}

LossResult soft_cross_entropy(const Tensor& logits, const std::optional<Tensor>& upstream, const Tensor& target,
                              const std::optional<Tensor>& weight, int64_t reduction, bool align_corners,
                              bool gradient) {
  check_soft_cross_entropy(logits, upstream, target, weight);
  const auto run =
      is_float64(logits) || is_float64(target) ? soft_cross_entropy_as<double> : soft_cross_entropy_as<float>;
  return run(logits, upstream, target, weight, reduction, align_corners, gradient);
}

template <class T>
LossResult cross_entropy_as(const Tensor& logits, const std::optional<Tensor>& upstream, const Tensor& labels,
                            const std::optional<Tensor>& class_weight, int64_t ignore_index, int64_t reduction,
                            bool align_corners, bool gradient) {
  const MapTable<T> table(logits, labels.size(1), labels.size(2), align_corners);
  const BandTable<T> bands(table.rows());
  std::optional<Tensor> weights;
  if (class_weight) weights = torch::stable::contiguous(torch::stable::to(*class_weight, kScalarType<T>));
  LossJob<T> job = {};
  job.label = Label::classes;
  job.classes = view_of(labels);
  job.ignore_index = ignore_index;
  job.class_weight = weights ? weights->template const_data_ptr<T>() : nullptr;
  job.upstream = view_of(upstream);
  return run_loss(job, logits, table, bands, reduction, gradient);
}

LossResult cross_entropy(const Tensor& logits, const std::optional<Tensor>& upstream, const Tensor& labels,
                         const std::optional<Tensor>& class_weight, int64_t ignore_index, int64_t reduction,
                         bool align_corners, bool gradient) {
  check_cross_entropy(logits, upstream, labels, class_weight);
  const auto run = is_float64(logits) ? cross_entropy_as<double> : cross_entropy_as<float>;
  return run(logits, upstream, labels, class_weight, ignore_index, reduction, align_corners, gradient);
}

template <class T>
Tensor class_sums_as(const Tensor& logits, const Tensor& labels, int64_t ignore_index, bool align_corners) {
  const int64_t images = logits.size(0), classes = logits.size(1), height = labels.size(1), width = labels.size(2);
  const MapTable<T> table(logits, height, width, align_corners);
  const BandTable<T> bands(table.rows());
  const int64_t items = images * bands.bands().count;
  std::vector<double> partial(items * 3 * classes), sums(3 * classes);
  const ClassSumsJob<T> job = {
      {images, classes, height, width, bands.bands()}, table.map(bands), view_of(labels), ignore_index, partial.data()};
  run_items(items, kernels<T>().class_sums_scratch(job), kernels<T>().class_sums, job);
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
  const MapTable<T> table(logits, labels.size(1), labels.size(2), align_corners);
  const BandTable<T> bands(table.rows());
  const Tensor of_sums = torch::stable::contiguous(upstream);
  LossJob<T> job = {};
  job.label = Label::sums;
  job.classes = view_of(labels);
  job.ignore_index = ignore_index;
  job.of_sums = of_sums.template const_data_ptr<T>();
  return std::get<2>(run_loss(job, logits, table, bands, kSum, true));
}

Tensor class_sums_backward(const Tensor& upstream, const Tensor& logits, const Tensor& labels, int64_t ignore_index,
                           bool align_corners) {
  check_class_sums_backward(upstream, logits, labels);
  const auto run = is_float64(logits) ? class_sums_backward_as<double> : class_sums_backward_as<float>;
  return run(upstream, logits, labels, ignore_index, align_corners);
}

template <class T>
LossResult consistency_loss_as(const Tensor& student, const std::optional<Tensor>& upstream, const Tensor& decoder,
                               const Tensor& cam, const std::optional<Tensor>& valid, int64_t height, int64_t width,
                               const FusionOptions& options, double threshold, bool hard, int64_t reduction,
                               bool gradient) {
  const MapTable<T> table(student, height, width, options.align_corners);
  const FusionTable<T> fusion(decoder, cam, height, width, options);
  const BandTable<T> bands(table.rows());
  LossJob<T> job = {};
  job.label = Label::fused;
  job.fusion = fusion.fusion(bands);
  job.threshold = T(threshold);
  job.hard = hard;
  job.weight = view_of(valid);
  job.upstream = view_of(upstream);
  return run_loss(job, student, table, bands, reduction, gradient);
}

LossResult consistency_loss(const Tensor& student, const std::optional<Tensor>& upstream, const Tensor& decoder,
                            const Tensor& cam, const std::optional<Tensor>& valid, int64_t height, int64_t width,
                            double gamma, double temperature, int64_t norm, double norm_eps, double threshold,
                            bool hard, int64_t reduction, bool align_corners, bool gradient) {
  check_consistency_loss(student, upstream, decoder, cam, valid, height, width);
  const FusionOptions options = {gamma, temperature, norm, norm_eps, align_corners};
  const bool wide = is_float64(student) || is_float64(decoder) || is_float64(cam);
  const auto run = wide ? consistency_loss_as<double> : consistency_loss_as<float>;
  return run(student, upstream, decoder, cam, valid, height, width, options, threshold, hard, reduction, gradient);
}

template <class T>
Tensor fuse_predictions_as(const Tensor& decoder, const Tensor& cam, int64_t height, int64_t width,
                           const FusionOptions& options) {
  constexpr int64_t kBuffer = 1 << 19;  // bytes of a band that stay in the second-level cache
  const FusionTable<T> fusion(decoder, cam, height, width, options);
  const BandTable<T> bands(fusion.rows(),
                           std::clamp<int64_t>(kBuffer / (decoder.size(1) * width * int64_t(sizeof(T))), 4, 32));
  Tensor label = torch::stable::new_empty(decoder, {decoder.size(0), decoder.size(1), height, width});
  advise_huge_pages(label, label.numel() * (dtype_of(label) == Dtype::f64 ? 8 : dtype_of(label) == Dtype::f32 ? 4 : 2));
  const FuseJob<T> job = {{decoder.size(0), decoder.size(1), height, width, bands.bands()},
                          fusion.fusion(bands),
                          label.mutable_data_ptr(),
                          dtype_of(label),
                          bands.max_height()};
  run_items(decoder.size(0) * bands.bands().count, kernels<T>().fuse_scratch(job), kernels<T>().fuse, job);
  return label;
}

Tensor fuse_predictions(const Tensor& decoder, const Tensor& cam, int64_t height, int64_t width, double gamma,
                        double temperature, int64_t norm, double norm_eps, bool align_corners) {
  check_map(decoder, "decoder_logits");
  check_map(cam, "cam_logits");
  check_same_classes(decoder, cam);
  STD_TORCH_CHECK(height > 0 && width > 0, "size must be at least 1 x 1");
  const FusionOptions options = {gamma, temperature, norm, norm_eps, align_corners};
  const auto run = is_float64(decoder) || is_float64(cam) ? fuse_predictions_as<double> : fuse_predictions_as<float>;
  return run(decoder, cam, height, width, options);
}

template <class T>
Tensor predict_labels_as(const Tensor& logits, int64_t height, int64_t width, bool align_corners) {
  const MapTable<T> table(logits, height, width, align_corners);
  const BandTable<T> bands(table.rows());
  const ScalarType dtype = logits.size(1) <= 256 ? ScalarType::Byte : ScalarType::Long;
  Tensor labels = torch::stable::new_empty(logits, {logits.size(0), height, width}, dtype);
  const PredictJob<T> job = {
      {logits.size(0), logits.size(1), height, width, bands.bands()}, table.map(bands), labels.mutable_data_ptr()};
  run_items(logits.size(0) * bands.bands().count, kernels<T>().predict_scratch(job), kernels<T>().predict, job);
  return labels;
}

Tensor predict_labels(const Tensor& logits, int64_t height, int64_t width, bool align_corners) {
  check_predict_labels(logits, height, width);
  return (is_float64(logits) ? predict_labels_as<double> : predict_labels_as<float>)(logits, height, width,
                                                                                     align_corners);
}

}  // namespace
}  // namespace psf

STABLE_TORCH_LIBRARY(pseudoseg_fast, library) {
  library.def(
      "soft_cross_entropy(Tensor logits, Tensor? upstream, Tensor target, Tensor? weight, int reduction, "
      "bool align_corners, bool gradient) -> (Tensor, Tensor, Tensor)");
  library.def(
      "cross_entropy(Tensor logits, Tensor? upstream, Tensor labels, Tensor? class_weight, int ignore_index, "
      "int reduction, bool align_corners, bool gradient) -> (Tensor, Tensor, Tensor)");
  library.def("class_sums(Tensor logits, Tensor labels, int ignore_index, bool align_corners) -> Tensor");
  library.def(
      "class_sums_backward(Tensor upstream, Tensor logits, Tensor labels, int ignore_index, bool align_corners) -> "
      "Tensor");
  library.def(
      "consistency_loss(Tensor student_logits, Tensor? upstream, Tensor decoder_logits, Tensor cam_logits, "
      "Tensor? valid, SymInt height, SymInt width, float gamma, float temperature, int norm, float norm_eps, "
      "float threshold, bool hard, int reduction, bool align_corners, bool gradient) -> (Tensor, Tensor, Tensor)");
  library.def(
      "fuse_predictions(Tensor decoder_logits, Tensor cam_logits, SymInt height, SymInt width, float gamma, "
      "float temperature, int norm, float norm_eps, bool align_corners) -> Tensor");
  library.def("predict_labels(Tensor logits, SymInt height, SymInt width, bool align_corners) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pseudoseg_fast, CPU, library) {
  library.impl("soft_cross_entropy", TORCH_BOX(&psf::soft_cross_entropy));
  library.impl("cross_entropy", TORCH_BOX(&psf::cross_entropy));
  library.impl("class_sums", TORCH_BOX(&psf::class_sums));
  library.impl("class_sums_backward", TORCH_BOX(&psf::class_sums_backward));
  library.impl("consistency_loss", TORCH_BOX(&psf::consistency_loss));
  library.impl("fuse_predictions", TORCH_BOX(&psf::fuse_predictions));
  library.impl("predict_labels", TORCH_BOX(&psf::predict_labels));
}
