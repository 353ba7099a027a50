// The tables of every axis of an operator, in one launch: nothing is copied from the host.
#pragma once

#include "position.h"
#include "work.cuh"

namespace psf::cuda {

constexpr int kMaxAxes = 6;

template <class T>
struct AxesWork {
  Axis<T> axes[kMaxAxes];
  bool align_corners;
};

// First output whose lower node is `node` or a later one.
__device__ inline int64_t first_output(int64_t node, int64_t source, int64_t target, double step, bool align_corners) {
  int64_t begin = 0, end = target;
  while (begin < end) {
    const int64_t middle = (begin + end) / 2;
    if (position_of(middle, source, step, align_corners).low < node) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

// Block (x, y): kThreads entries of the tables of axis y.
template <class T>
__global__ void axes_kernel(const __grid_constant__ AxesWork<T> work) {
  const Axis<T>& axis = work.axes[blockIdx.y];
  const double step = position_step(axis.source, axis.target, work.align_corners);
  const auto position = [&](int64_t i) { return position_of(i, axis.source, step, work.align_corners); };
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < axis.target) {
    axis.low[i] = int32_t(position(i).low);
    axis.weight[i] = T(position(i).weight);
  }
  if (i > axis.source) return;
  const auto first = [&](int64_t node) {
    return first_output(node, axis.source, axis.target, step, work.align_corners);
  };
  axis.first[i] = int32_t(first(i));
  if (i == axis.source) return;
  double diagonal = 0, pairs = 0;
  const int64_t own = first(i), end = first(i + 1);
  for (int64_t k = i > 0 ? first(i - 1) : own; k < end; ++k) {
    const double high = position(k).weight, low = 1 - high;
    diagonal += k < own ? high * high : low * low;
    if (k >= own) pairs += low * high;
  }
  axis.diagonal[i] = T(diagonal);
  axis.pairs[i] = T(pairs);
}

}  // namespace psf::cuda
