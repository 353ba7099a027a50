// The convolution of each channel with a filter of its own as an operator of the CPU backend, and its derivative.
// Maps are [B, H, W, C] here, which is how torch stores [B, C, H, W] in the memory format channels_last.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "jobs.h"
#include "kernels_cpu.h"

namespace psf {
namespace {

struct Geometry {
  std::vector<int64_t> stride, padding, dilation;  // of rows and columns
};

// Tell which taps of an axis ever meet an element of the source.
DepthwiseAxis with_live_taps(DepthwiseAxis axis) {
  const int64_t last = (axis.source - 1) * axis.spread, reach = (axis.target - 1) * axis.stride;
  const auto meets = [&](int64_t tap) {
    const int64_t at = tap * axis.dilation - axis.padding;
    return at <= last && at + reach >= 0;
  };
  axis.first = axis.live = 0;
  for (int64_t tap = axis.taps - 1; tap >= 0; --tap) {
    if (!meets(tap)) continue;
    axis.first = tap;
    ++axis.live;
  }
  return axis;
}

DepthwiseAxis forward_axis(const Tensor& input, const Tensor& weight, const Geometry& geometry, int64_t i) {
  const int64_t source = input.size(1 + i), taps = weight.size(2 + i);
  const int64_t stride = geometry.stride[i], padding = geometry.padding[i], dilation = geometry.dilation[i];
  const int64_t span = source + 2 * padding - dilation * (taps - 1) - 1;
  STD_TORCH_CHECK(span >= 0, "the dilated filter is larger than the padded input");
  const int64_t target = span / stride + 1;
  // A stride that takes no step says nothing, however wide it is.
  return with_live_taps({source, target, taps, target > 1 ? stride : 1, padding, dilation, 1, 0, 0});
}

// The axis of the gradient of the input: the upstream gradient, spread by the stride, under the reversed filter.
DepthwiseAxis backward_axis(const DepthwiseAxis& forward) {
  const int64_t padding = forward.dilation * (forward.taps - 1) - forward.padding;
  return with_live_taps(
      {forward.target, forward.source, forward.taps, 1, padding, forward.dilation, forward.stride, 0, 0});
}

template <class T>
DepthwiseJob<T> make_job(const DepthwiseAxis& rows, const DepthwiseAxis& columns, int64_t channels) {
  constexpr int64_t kStaged = 1 << 18;  // bytes that stay in the second-level cache
  const int64_t lanes = kernels<T>().lanes, pixels = (columns.target + 3) / 4 * 4;
  DepthwiseJob<T> job = {};
  job.rows = rows;
  job.columns = columns;
  job.channels = channels;
  job.blocks = (channels + lanes - 1) / lanes;
  job.staged_columns = (pixels - 1) * columns.stride + std::max<int64_t>(columns.live - 1, 0) * columns.dilation + 1;
  const auto staged_rows = [&](int64_t band) {
    return std::min(rows.source, ((band - 1) * rows.stride + (rows.taps - 1) * rows.dilation) / rows.spread + 2);
  };
  job.band = rows.target;
  const int64_t row = std::max(job.staged_columns * lanes, columns.source * channels) * int64_t(sizeof(T));
  while (job.band > 4 && staged_rows(job.band) * row > kStaged) {
    job.band = (job.band + 1) / 2;
  }
  job.staged_rows = staged_rows(job.band);
  return job;
}

template <class T>
int64_t items_of(const DepthwiseJob<T>& job, int64_t images) {
  return images * job.blocks * ((job.rows.target + job.band - 1) / job.band);
}

// Where tap (ky, kx) of channel c lies in a filter [C, 1, taps, taps].
template <class T>
int64_t tap_of(const DepthwiseJob<T>& job, int64_t c, int64_t ky, int64_t kx) {
  return (c * job.rows.taps + ky) * job.columns.taps + kx;
}

// The live taps of a filter, a vector of channels side by side; the last tap first if `reversed`.
template <class T>
std::vector<T> pack(const DepthwiseJob<T>& job, const T* filter, bool reversed) {
  const int64_t lanes = kernels<T>().lanes, rows = job.rows.taps, live = job.columns.live;
  std::vector<T> packed(job.blocks * rows * live * lanes);
  for (int64_t c = 0; c < job.channels; ++c) {
    for (int64_t ky = 0; ky < rows; ++ky) {
      for (int64_t k = 0; k < live; ++k) {
        const int64_t kx = job.columns.first + k;
        packed[((c / lanes * rows + ky) * live + k) * lanes + c % lanes] =
            filter[reversed ? tap_of(job, c, rows - 1 - ky, job.columns.taps - 1 - kx) : tap_of(job, c, ky, kx)];
      }
    }
  }
  return packed;
}

template <class T>
Tensor correlate(DepthwiseJob<T> job, const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                 bool reversed) {
  const int64_t images = input.size(0);
  const std::vector<T> filter = pack(job, weight.const_data_ptr<T>(), reversed);
  std::vector<T> shift;
  if (bias) {
    shift.assign(job.blocks * kernels<T>().lanes, T(0));
    std::copy_n(bias->const_data_ptr<T>(), job.channels, shift.begin());
  }
  Tensor output =
      torch::stable::new_empty(input, {images, job.rows.target, job.columns.target, job.channels}, kScalarType<T>);
  job.input = input.const_data_ptr<T>();
  job.filter = filter.data();
  job.bias = bias ? shift.data() : nullptr;
  job.output = output.mutable_data_ptr<T>();
  run_items(items_of(job, images), kernels<T>().depthwise_scratch(job), kernels<T>().depthwise, job);
  return output;
}

template <class T>
Tensor filter_gradient(DepthwiseJob<T> job, const Tensor& upstream, const Tensor& input, const Tensor& weight) {
  const int64_t lanes = kernels<T>().lanes, rows = job.rows.taps, live = job.columns.live;
  const int64_t items = items_of(job, input.size(0));
  std::vector<T> partial(items * rows * live * lanes);
  job.input = input.const_data_ptr<T>();
  job.upstream = upstream.const_data_ptr<T>();
  job.partial = partial.data();
  run_items(items, kernels<T>().depthwise_filter_scratch(job), kernels<T>().depthwise_filter, job);

  Tensor gradient = torch::stable::new_zeros(weight, {job.channels, 1, rows, job.columns.taps}, kScalarType<T>);
  T* const sums = gradient.mutable_data_ptr<T>();
  for (int64_t item = 0; item < items; ++item) {
    const int64_t first = item % job.blocks * lanes, last = std::min(first + lanes, job.channels);
    const T* const more = partial.data() + item * rows * live * lanes;
    for (int64_t tap = 0; tap < rows * live; ++tap) {
      for (int64_t c = first; c < last; ++c) {
        sums[tap_of(job, c, tap / live, job.columns.first + tap % live)] += more[tap * lanes + c - first];
      }
    }
  }
  return gradient;
}

void check(const Tensor& input, const Tensor& weight, const Geometry& geometry) {
  STD_TORCH_CHECK(input.dim() == 4 && input.size(1) > 0 && input.size(2) > 0, "input must be [B, H, W, C] with pixels");
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(0) == input.size(3) && weight.size(1) == 1 && weight.size(2) > 0 &&
                      weight.size(3) > 0,
                  "weight must be [C, 1, height, width]");
  STD_TORCH_CHECK(input.scalar_type() == weight.scalar_type() &&
                      (input.scalar_type() == ScalarType::Float || input.scalar_type() == ScalarType::Double),
                  "input and weight must both be float32 or both be float64");
  for (const auto* values : {&geometry.stride, &geometry.padding, &geometry.dilation}) {
    STD_TORCH_CHECK(values->size() == 2, "stride, padding and dilation must have two values");
  }
  for (int i = 0; i < 2; ++i) {
    STD_TORCH_CHECK(geometry.stride[i] > 0 && geometry.dilation[i] > 0 && geometry.padding[i] >= 0,
                    "stride and dilation must be positive, padding not negative");
  }
}

template <class T>
Tensor convolve_as(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                   const Geometry& geometry) {
  const auto job =
      make_job<T>(forward_axis(input, weight, geometry, 0), forward_axis(input, weight, geometry, 1), weight.size(0));
  return correlate(job, input, weight, bias, false);
}

Tensor depthwise_conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                        std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation) {
  const Geometry geometry = {std::move(stride), std::move(padding), std::move(dilation)};
  check(input, weight, geometry);
  STD_TORCH_CHECK(
      !bias || (bias->dim() == 1 && bias->size(0) == weight.size(0) && bias->scalar_type() == weight.scalar_type()),
      "bias must be [C], of the dtype of weight");
  const auto run = is_float64(input) ? convolve_as<double> : convolve_as<float>;
  std::optional<Tensor> shift;
  if (bias) shift = torch::stable::contiguous(*bias);
  return run(torch::stable::contiguous(input), torch::stable::contiguous(weight), shift, geometry);
}

template <class T>
std::tuple<Tensor, Tensor> gradients_as(const Tensor& upstream, const Tensor& input, const Tensor& weight,
                                        const Geometry& geometry, bool of_input, bool of_weight) {
  const DepthwiseAxis rows = forward_axis(input, weight, geometry, 0),
                      columns = forward_axis(input, weight, geometry, 1);
  STD_TORCH_CHECK(upstream.dim() == 4 && upstream.size(0) == input.size(0) && upstream.size(1) == rows.target &&
                      upstream.size(2) == columns.target && upstream.size(3) == input.size(3) &&
                      upstream.scalar_type() == input.scalar_type(),
                  "the gradient must have the shape and the dtype of the output");
  Tensor input_gradient = torch::stable::new_empty(input, {0}, kScalarType<T>);
  Tensor weight_gradient = torch::stable::new_empty(input, {0}, kScalarType<T>);
  if (of_input) {
    const auto job = make_job<T>(backward_axis(rows), backward_axis(columns), weight.size(0));
    input_gradient = correlate(job, upstream, weight, std::nullopt, true);
  }
  if (of_weight) {
    weight_gradient = filter_gradient(make_job<T>(rows, columns, weight.size(0)), upstream, input, weight);
  }
  return {input_gradient, weight_gradient};
}

std::tuple<Tensor, Tensor> depthwise_conv2d_backward(const Tensor& upstream, const Tensor& input, const Tensor& weight,
                                                     std::vector<int64_t> stride, std::vector<int64_t> padding,
                                                     std::vector<int64_t> dilation, bool of_input, bool of_weight) {
  const Geometry geometry = {std::move(stride), std::move(padding), std::move(dilation)};
  check(input, weight, geometry);
  const auto run = is_float64(input) ? gradients_as<double> : gradients_as<float>;
  return run(torch::stable::contiguous(upstream), torch::stable::contiguous(input), torch::stable::contiguous(weight),
             geometry, of_input, of_weight);
}

}  // namespace
}  // namespace psf

STABLE_TORCH_LIBRARY_FRAGMENT(pseudoseg_fast, library) {
  library.def(
      "depthwise_conv2d(Tensor input, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation) -> "
      "Tensor");
  library.def(
      "depthwise_conv2d_backward(Tensor upstream, Tensor input, Tensor weight, int[] stride, int[] padding, "
      "int[] dilation, bool of_input, bool of_weight) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pseudoseg_fast, CPU, library) {
  library.impl("depthwise_conv2d", TORCH_BOX(&psf::depthwise_conv2d));
  library.impl("depthwise_conv2d_backward", TORCH_BOX(&psf::depthwise_conv2d_backward));
}
