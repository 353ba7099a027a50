// CPU kernels, compiled once for each instruction set with PSF_ISA naming it. Everything here has internal linkage
// or stands in the namespace of the instruction set, so no code for a newer processor can reach an older one.

#include "kernels_cpu.h"

namespace psf::PSF_ISA {

namespace {

// <a, Wx'Wx b> for two rows of a map, Wx'Wx tridiagonal with diagonal `columns` and off-diagonal `pairs`.
float row_product(const float* a, const float* b, int64_t width, const float* columns, const float* pairs) {
  float sum = 0.f;
#pragma omp simd reduction(+ : sum)
  for (int64_t x = 0; x < width - 1; ++x) {
    sum += columns[x] * a[x] * b[x] + pairs[x] * (a[x] * b[x + 1] + a[x + 1] * b[x]);
  }
  return sum + columns[width - 1] * a[width - 1] * b[width - 1];
}

}  // namespace

// Sum of squares of one map [height, width] after bilinear upsampling, which is never done: with Wy and Wx the
// interpolation matrices it is <map, (Wy'Wy) map (Wx'Wx)>, and both products are tridiagonal.
float upsampled_square_sum(const float* map, int64_t height, int64_t width, const float* rows, const float* row_pairs,
                           const float* columns, const float* column_pairs) {
  float sum = 0.f;
  for (int64_t y = 0; y < height; ++y) {
    const float* row = map + y * width;
    sum += rows[y] * row_product(row, row, width, columns, column_pairs);
    if (y + 1 < height) {
      sum += 2.f * row_pairs[y] * row_product(row, row + width, width, columns, column_pairs);
    }
  }
  return sum;
}

}  // namespace psf::PSF_ISA
