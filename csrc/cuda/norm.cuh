// The common scale of two maps, rsqrt of the mean of their squares at the output size, without upsampling them.
#pragma once

#include "formulas.h"
#include "group.cuh"

namespace psf::cuda {

template <class T>
struct SquareWork {
  Map<T> maps[2];
  int64_t classes;
  double* sums;  // [2, B, C]
};

// Block (b C + c, map): the sum of squares of one channel, one warp to a row.
template <class T>
__global__ void square_kernel(const __grid_constant__ SquareWork<T> work) {
  const Map<T>& map = work.maps[blockIdx.y];
  const int64_t *strides = map.view.strides, plane = blockIdx.x;
  const int64_t base = plane / work.classes * strides[0] + plane % work.classes * strides[1];
  const int64_t height = map.rows.source, width = map.columns.source;
  double sum = 0;
  with_reader<T>(map.view, [&](auto read) {
    for (int64_t y = threadIdx.x / 32; y < height; y += kWarps) {
      const T row_pair = y > 0 ? map.rows.pairs[y - 1] : T(0);
      const int64_t up = y > 0 ? strides[2] : 0;
      T of_row = T(0);
      for (int64_t x = threadIdx.x % 32; x < width; x += 32) {
        const int64_t at = base + y * strides[2] + x * strides[3], next = at + (x + 1 < width ? strides[3] : 0);
        of_row += square_term(read(at), read(next), read(at - up), read(next - up), map.rows.diagonal[y], row_pair,
                              map.columns.diagonal[x], map.columns.pairs[x]);
      }
      sum += double(of_row);
    }
  });
  sum = block_sum(sum, psf_shared_memory);
  if (threadIdx.x == 0) work.sums[int64_t(blockIdx.y) * gridDim.x + plane] = sum;
}

template <class T>
struct FactorWork {
  const double* sums;  // [2, B, C]
  int64_t images, classes;
  double pixels;  // of one channel at the output size
  double eps;
  bool per_image;
  double* squares;  // [B]
  T* factor;        // [B]
};

// One block: the mean of squares of each image, one warp to an image, then the factor of each.
template <class T>
__global__ void factor_kernel(const __grid_constant__ FactorWork<T> work) {
  for (int64_t b = threadIdx.x / 32; b < work.images; b += kWarps) {
    double sum = 0;
    for (int64_t c = threadIdx.x % 32; c < work.classes; c += 32) {
      sum += work.sums[b * work.classes + c] + work.sums[(work.images + b) * work.classes + c];
    }
    for (int offset = 16; offset > 0; offset >>= 1) sum += __shfl_xor_sync(~0u, sum, offset);
    if (threadIdx.x % 32 == 0) work.squares[b] = sum / (2 * double(work.classes) * work.pixels);
  }
  __syncthreads();
  double total = 0;
  for (int64_t b = threadIdx.x; b < work.images; b += kThreads) total += work.squares[b];
  total = block_sum(total, psf_shared_memory);
  for (int64_t b = threadIdx.x; b < work.images; b += kThreads) {
    const double square = work.per_image ? work.squares[b] : total / double(work.images);
    work.factor[b] = T(1 / sqrt(square + work.eps));
  }
}

}  // namespace psf::cuda
