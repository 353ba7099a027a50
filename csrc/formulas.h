// Formulas that the CPU kernels apply to vectors of pixels (V) and the CUDA kernels to single ones, in scalars S.
#pragma once

#include "host_device.h"

namespace psf::PSF_ISA {
namespace {

constexpr double kLowest = -1e30;  // lower bound of a logit: -inf rules a class out and still interpolates to a number
constexpr double kLog2e = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

// A logit in units of ln 2, bounded below; NaN stays NaN. `factor` is the scale of its map / ln 2.
template <class S, class V>
PSF_HOST_DEVICE inline V scaled_logit(V z, S factor) {
  return (z < S(kLowest) ? V{} + S(kLowest) : z) * factor;
}

template <class V, class W>
PSF_HOST_DEVICE inline V interpolate(V low, V high, W weight) {
  return low + weight * (high - low);
}

// One term of <map, (Wy'Wy) map (Wx'Wx)>, both products tridiagonal: a0 and a1 are a node and the next of its row, b0
// and b1 the nodes above them, zero above the first row. `row` is the diagonal of Wy'Wy, `row_pair` its element between
// this row and the one above, likewise `column`, and `column_pair` for this column and the next.
template <class S, class V>
PSF_HOST_DEVICE inline V square_term(V a0, V a1, V b0, V b1, S row, S row_pair, V column, V column_pair) {
  const S above = 2 * row_pair;
  const V c0 = b0 * above + a0 * row, c1 = b1 * above + a1 * row;
  return column * a0 * c0 + column_pair * (a0 * c1 + a1 * c0);
}

// The loss of a pixel of weight w: total * log(sum of exponentials) - <label, logits>, both given in units of ln 2.
// A pixel of weight zero has no loss, whatever its logits.
template <class S, class V>
PSF_HOST_DEVICE inline V pixel_loss(V w, V total, V log2_sum, V product) {
  return w == S(0) ? V{} : (total * log2_sum - product) * S(kLn2);
}

}  // namespace
}  // namespace psf::PSF_ISA
