// Operators of the CUDA backend, with the schemas of csrc/ops.cpp: allocations and the order of launches.
//
// Everything runs on the current stream without a synchronisation or a copy from the host, and all memory is torch's,
// so a CUDA graph can record it.

#include <torch/csrc/stable/library.h>

#include "arguments.h"
#include "class_sums.cuh"
#include "finish.cuh"
#include "loss.cuh"
#include "norm.cuh"
#include "plan.h"
#include "predict.cuh"

namespace psf::cuda {
namespace {

template <class T>
int64_t loss_memory(const LossWork<T>& work) {
  Shared shared(nullptr);
  Group::reserve(shared);
  LossMemory<T>(shared, work);
  return shared.bytes();
}

// Run a loss whose maps, label, weight and upstream gradient `work` already holds.
template <class T, Label kLabel>
LossResult run_loss(const Launcher& launch, LossWork<T>& work, const Tensor& student, int64_t reduction,
                    bool with_gradient) {
  const int64_t images = student.size(0), classes = student.size(1), rows = student.size(2), columns = student.size(3);
  const int64_t height = work.student.rows.target, width = work.student.columns.target;
  Tensor gradient = with_gradient ? torch::stable::new_empty(student, {images, classes, rows, columns}, kScalarType<T>)
                                  : torch::stable::new_empty(student, {0}, kScalarType<T>);
  Tensor loss = reduction == kNone ? torch::stable::new_empty(student, {images, height, width}, kScalarType<T>)
                                   : torch::stable::new_empty(student, {}, kScalarType<T>);
  Tensor denominator = torch::stable::new_empty(student, {}, kScalarType<T>);

  work.classes = int(classes);
  work.group = group_size<T>(classes);
  work.loss = reduction == kNone ? loss.template mutable_data_ptr<T>() : nullptr;
  work.gradient = with_gradient ? gradient.template mutable_data_ptr<T>() : nullptr;
  const int64_t left = kSharedBytes - loss_memory(work);
  work.tiling =
      tiling_of(images, rows, columns, height, width, kThreads / work.group, left / (2 * classes * int64_t(sizeof(T))));
  const int64_t tiles = work.tiling.count(), overlaps = with_gradient ? tiles * classes * overlap_size(work.tiling) : 0;
  const Tensor overlap = torch::stable::new_empty(student, {overlaps}, kScalarType<T>);
  const Tensor partial = torch::stable::new_empty(student, {2 * tiles}, ScalarType::Double);
  work.overlap = overlap.template mutable_data_ptr<T>();
  work.partial = partial.template mutable_data_ptr<double>();
  launch(loss_kernel<T, kLabel>, tiles, 1, loss_memory(work), work);

  const int64_t borders = work.tiling.across + work.tiling.down - 2;
  const bool shared = with_gradient && borders > 0 && images > 0;
  const FinishWork<T> finish = {work.tiling,
                                classes,
                                rows,
                                columns,
                                shared ? work.gradient : nullptr,
                                work.overlap,
                                work.partial,
                                reduction == kMean,
                                reduction == kNone ? nullptr : loss.template mutable_data_ptr<T>(),
                                denominator.template mutable_data_ptr<T>()};
  launch(finish_kernel<T>, shared ? images * classes : 1, shared ? borders + 1 : 1, 2 * kWarps * sizeof(double),
         finish);
  return {loss, denominator, gradient};
}

template <class T>
LossResult soft_cross_entropy_as(const Tensor& logits, const std::optional<Tensor>& upstream, const Tensor& target,
                                 const std::optional<Tensor>& weight, int64_t reduction, bool align_corners,
                                 bool gradient) {
  const Launcher launch(logits);
  Maps<T> maps(launch, {&logits}, target.size(2), target.size(3), align_corners);
  LossWork<T> work = {};
  work.student = maps[0];
  work.target = view_of(target);
  work.weight = view_of(weight);
  work.upstream = view_of(upstream);
  return run_loss<T, Label::target>(launch, work, logits, reduction, gradient);
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
  const Launcher launch(logits);
  Maps<T> maps(launch, {&logits}, labels.size(1), labels.size(2), align_corners);
  std::optional<Tensor> weights;
  if (class_weight) weights = torch::stable::contiguous(torch::stable::to(*class_weight, kScalarType<T>));
  LossWork<T> work = {};
  work.student = maps[0];
  work.labels = view_of(labels);
  work.ignore_index = ignore_index;
  work.class_weight = weights ? weights->template const_data_ptr<T>() : nullptr;
  work.upstream = view_of(upstream);
  return run_loss<T, Label::classes>(launch, work, logits, reduction, gradient);
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
  const Launcher launch(logits);
  const int64_t images = logits.size(0), classes = logits.size(1), height = labels.size(1), width = labels.size(2);
  Maps<T> maps(launch, {&logits}, height, width, align_corners);
  const int group = group_size<T>(classes);
  const Tiling tiling =
      tiling_of(images, logits.size(2), logits.size(3), height, width, kThreads / group, logits.size(3));
  const Tensor partial = torch::stable::new_empty(logits, {3 * classes * tiling.count()}, ScalarType::Double);
  Tensor sums = torch::stable::new_empty(logits, {3, classes}, kScalarType<T>);
  const ClassSumsWork<T> work = {
      tiling, group, int(classes), maps[0], view_of(labels), ignore_index, partial.template mutable_data_ptr<double>()};
  Shared shared(nullptr);
  Group::reserve(shared);
  class_sums_memory(shared);
  launch(class_sums_kernel<T>, tiling.count(), 1, shared.bytes(), work);
  const SumOfTilesWork<T> all = {work.partial, tiling.count(), sums.template mutable_data_ptr<T>()};
  launch(sum_of_tiles_kernel<T>, 3 * classes, 1, kWarps * sizeof(double), all);
  return sums;
}

Tensor class_sums(const Tensor& logits, const Tensor& labels, int64_t ignore_index, bool align_corners) {
  check_class_sums(logits, labels);
  const auto run = is_float64(logits) ? class_sums_as<double> : class_sums_as<float>;
  return run(logits, labels, ignore_index, align_corners);
}

template <class T>
Tensor class_sums_backward_as(const Tensor& upstream, const Tensor& logits, const Tensor& labels, int64_t ignore_index,
                              bool align_corners) {
  const Launcher launch(logits);
  Maps<T> maps(launch, {&logits}, labels.size(1), labels.size(2), align_corners);
  const Tensor of_sums = torch::stable::contiguous(upstream);
  LossWork<T> work = {};
  work.student = maps[0];
  work.labels = view_of(labels);
  work.ignore_index = ignore_index;
  work.of_sums = of_sums.template const_data_ptr<T>();
  return std::get<2>(run_loss<T, Label::sums>(launch, work, logits, kSum, true));
}

Tensor class_sums_backward(const Tensor& upstream, const Tensor& logits, const Tensor& labels, int64_t ignore_index,
                           bool align_corners) {
  check_class_sums_backward(upstream, logits, labels);
  const auto run = is_float64(logits) ? class_sums_backward_as<double> : class_sums_backward_as<float>;
  return run(upstream, logits, labels, ignore_index, align_corners);
}

// Compute the common factor of two maps, [B], and point both to it.
template <class T>
Tensor common_factor(const Launcher& launch, const Tensor& like, Map<T>& decoder, Map<T>& cam,
                     const FusionOptions& options) {
  const int64_t images = like.size(0), classes = like.size(1);
  const Tensor sums = torch::stable::new_empty(like, {(2 * classes + 1) * images}, ScalarType::Double);
  Tensor factor = torch::stable::new_empty(like, {images}, kScalarType<T>);
  const SquareWork<T> squares = {{decoder, cam}, classes, sums.template mutable_data_ptr<double>()};
  launch(square_kernel<T>, images * classes, 2, kWarps * sizeof(double), squares);
  const FactorWork<T> work = {squares.sums,
                              images,
                              classes,
                              double(decoder.rows.target) * double(decoder.columns.target),
                              options.norm_eps,
                              options.norm == kImage,
                              squares.sums + 2 * images * classes,
                              factor.template mutable_data_ptr<T>()};
  launch(factor_kernel<T>, images > 0 ? 1 : 0, 1, kWarps * sizeof(double), work);
  decoder.factor = cam.factor = work.factor;
  return factor;
}

template <class T>
LossResult consistency_loss_as(const Tensor& student, const std::optional<Tensor>& upstream, const Tensor& decoder,
                               const Tensor& cam, const std::optional<Tensor>& valid, int64_t height, int64_t width,
                               const FusionOptions& options, double threshold, bool hard, int64_t reduction,
                               bool gradient) {
  const Launcher launch(student);
  Maps<T> maps(launch, {&student, &decoder, &cam}, height, width, options.align_corners);
  std::optional<Tensor> factor;
  if (options.norm == kBatch || options.norm == kImage) {
    factor = common_factor(launch, student, maps[1], maps[2], options);
  }
  LossWork<T> work = {};
  work.student = maps[0];
  work.fusion = {maps[1],
                 maps[2],
                 T(options.gamma),
                 T(1 / options.temperature),
                 options.temperature == 1.0   ? Power::one
                 : options.temperature == 0.5 ? Power::square
                                              : Power::any,
                 options.norm == kPixel,
                 T(options.norm_eps)};
  work.threshold = T(threshold);
  work.hard = hard;
  work.weight = view_of(valid);
  work.upstream = view_of(upstream);
  return run_loss<T, Label::fused>(launch, work, student, reduction, gradient);
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
Tensor predict_labels_as(const Tensor& logits, int64_t height, int64_t width, bool align_corners) {
  const Launcher launch(logits);
  Maps<T> maps(launch, {&logits}, height, width, align_corners);
  const int64_t images = logits.size(0), classes = logits.size(1);
  const ScalarType dtype = classes <= 256 ? ScalarType::Byte : ScalarType::Long;
  Tensor labels = torch::stable::new_empty(logits, {images, height, width}, dtype);
  const int group = group_size<T>(classes);
  const Tiling tiling =
      tiling_of(images, logits.size(2), logits.size(3), height, width, kThreads / group, logits.size(3));
  const PredictWork<T> work = {tiling, group, int(classes), maps[0], labels.mutable_data_ptr()};
  Shared shared(nullptr);
  Group::reserve(shared);
  launch(predict_kernel<T>, tiling.count(), 1, shared.bytes(), work);
  return labels;
}

Tensor predict_labels(const Tensor& logits, int64_t height, int64_t width, bool align_corners) {
  check_predict_labels(logits, height, width);
  return (is_float64(logits) ? predict_labels_as<double> : predict_labels_as<float>)(logits, height, width,
                                                                                     align_corners);
}

}  // namespace
}  // namespace psf::cuda

// The build names the device: CUDA, but in tests that run the kernels on a processor.
STABLE_TORCH_LIBRARY_IMPL(pseudoseg_fast, PSF_DEVICE, library) {
  library.impl("soft_cross_entropy", TORCH_BOX(&psf::cuda::soft_cross_entropy));
  library.impl("cross_entropy", TORCH_BOX(&psf::cuda::cross_entropy));
  library.impl("class_sums", TORCH_BOX(&psf::cuda::class_sums));
  library.impl("class_sums_backward", TORCH_BOX(&psf::cuda::class_sums_backward));
  library.impl("consistency_loss", TORCH_BOX(&psf::cuda::consistency_loss));
  library.impl("predict_labels", TORCH_BOX(&psf::cuda::predict_labels));
}
