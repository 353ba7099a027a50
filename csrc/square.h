// The sum of squares of an upsampled map, from its nodes.
#pragma once

#include "formulas.h"
#include "view.h"

namespace psf::PSF_ISA {
namespace {

// Sum of squares of one channel after upsampling: <map, (Wy'Wy) map (Wx'Wx)>, both products tridiagonal.
template <class T>
double square_sum(const SquareJob<T>& job, int64_t image, int64_t channel, T* scratch) {
  const int64_t pitch = (job.width + 2 * kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  T *upper = scratch, *row = scratch + pitch;
  for (int64_t x = 0; x < 2 * pitch; ++x) scratch[x] = T(0);
  Vec<T> sum = {};
  for (int64_t y = 0; y < job.height; ++y) {
    const View& view = job.logits;
    load_row(element(view, image, channel, y, 0), view.dtype, view.strides[3], job.width, row);
    const T pair = y > 0 ? job.row_pairs[y - 1] : T(0);
    Vec<T> products = {};
    for (int64_t x = 0; x < job.width; x += kLanes<T>) {
      products += square_term(load(row + x), load(row + x + 1), load(upper + x), load(upper + x + 1), job.rows[y], pair,
                              load(job.columns + x), load(job.column_pairs + x));
    }
    sum += products;
    T* const swapped = upper;
    upper = row;
    row = swapped;
  }
  double total = 0;
  for (int i = 0; i < kLanes<T>; ++i) total += double(sum[i]);
  return total;
}

}  // namespace
}  // namespace psf::PSF_ISA
