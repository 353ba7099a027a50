// What follows the tiles of a loss, in one launch: the gradient at nodes that tiles share, and the loss itself.
#pragma once

#include "group.cuh"

namespace psf::cuda {

template <class T>
struct FinishWork {
  Tiling tiling;
  int64_t classes, height, width;  // height and width in nodes
  T* gradient;                     // [B, C, h, w] or null
  const T* overlap;                // [tiles, C, overlap_size]
  const double* partial;           // [tiles, 2]
  bool mean;
  T* loss;         // scalar or null
  T* denominator;  // scalar
};

// Add what the tiles above and to the left have for a node on the border of its tile, in that order.
template <class T>
__device__ void add_overlap(const FinishWork<T>& work, int64_t plane, int64_t y, int64_t x) {
  const Tiling& tiling = work.tiling;
  const int64_t image = plane / work.classes, c = plane % work.classes;
  const int64_t row = y / tiling.rows, column = x / tiling.columns, n = x % tiling.columns;
  const bool above = y > 0 && y % tiling.rows == 0, beside = x > 0 && n == 0;
  const auto overlap = [&](int64_t tile_row, int64_t tile_column, int64_t i) {
    const int64_t tile = (image * tiling.down + tile_row) * tiling.across + tile_column;
    return work.overlap[(tile * work.classes + c) * overlap_size(tiling) + i];
  };
  T sum = work.gradient[(plane * work.height + y) * work.width + x];
  if (above) sum += overlap(row - 1, column, tiling.rows + n);
  if (beside) sum += overlap(row, column - 1, y % tiling.rows);
  if (above && beside) sum += overlap(row - 1, column - 1, tiling.rows + tiling.columns);
  work.gradient[(plane * work.height + y) * work.width + x] = sum;
}

// Block (b C + c, i): line i of the nodes on borders, first the upright ones, then the level ones; behind the last
// line, block 0 reduces the loss.
template <class T>
__global__ void finish_kernel(const __grid_constant__ FinishWork<T> work) {
  const Tiling& tiling = work.tiling;
  const int64_t line = blockIdx.y, upright = tiling.across - 1;
  if (work.gradient && line < upright) {
    const int64_t x = (line + 1) * tiling.columns;
    for (int64_t y = threadIdx.x; y < work.height; y += kThreads) add_overlap(work, blockIdx.x, y, x);
  } else if (work.gradient && line < upright + tiling.down - 1) {
    const int64_t y = (line - upright + 1) * tiling.rows;
    for (int64_t x = threadIdx.x; x < work.width; x += kThreads) {
      if (x == 0 || x % tiling.columns != 0) add_overlap(work, blockIdx.x, y, x);
    }
  } else if (blockIdx.x == 0) {
    double loss = 0, weight = 0;
    for (int64_t i = threadIdx.x; i < tiling.count(); i += kThreads) {
      loss += work.partial[2 * i];
      weight += work.partial[2 * i + 1];
    }
    loss = block_sum(loss, psf_shared_memory);
    weight = block_sum(weight, psf_shared_memory + kWarps);
    if (threadIdx.x != 0) return;
    const double divisor = work.mean && weight > 0 ? weight : 1.0;
    *work.denominator = T(divisor);
    if (work.loss) *work.loss = T(loss / divisor);
  }
}

}  // namespace psf::cuda
