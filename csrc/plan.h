// Tables of the interpolation and the bands of a job.
// Include this only from sources compiled for the baseline.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels_cpu.h"
#include "position.h"

namespace psf {

// One axis of a bilinear interpolation, with the meaning of align_corners in torch.nn.functional.interpolate.
template <class T>
class AxisTable {
 public:
  AxisTable(int64_t source, int64_t target, bool align_corners)
      : low_(target), weight_(target), steady_(target), axis_{source,         target,         low_.data(),
                                                              weight_.data(), steady_.data(), T(0)} {
    const double step = position_step(source, target, align_corners);
    bool clamped = true;
    for (int64_t i = 0; i < target; ++i) {
      const Position position = position_of(i, source, step, align_corners);
      low_[i] = int32_t(position.low);
      weight_[i] = T(position.weight);
      steady_[i] = !clamped && !position.clamped && low_[i] == low_[i - 1];
      clamped = position.clamped;
    }
    axis_.step = T(step);
  }
  AxisTable(const AxisTable&) = delete;
  AxisTable& operator=(const AxisTable&) = delete;

  const Axis<T>& axis() const { return axis_; }

 private:
  std::vector<int32_t> low_;
  std::vector<T> weight_;
  std::vector<uint8_t> steady_;
  Axis<T> axis_;
};

template <class T>
class FoldTable {
 public:
  explicit FoldTable(const Axis<T>& axis) {
    const int64_t phases = (axis.target + axis.source - 1) / axis.source, pitch = (axis.source + 15) / 16 * 16;
    column_.assign(phases * pitch, -1);
    low_.assign(phases * pitch, T(0));
    high_.assign(phases * pitch, T(0));
    for (int64_t x = 0, phase = 0; x < axis.target; ++x) {
      phase = x > 0 && axis.low[x] == axis.low[x - 1] ? phase + 1 : 0;
      if (phase < phases) {
        const int64_t at = phase * pitch + axis.low[x];
        column_[at] = int32_t(x);
        low_[at] = T(1) - axis.weight[x];
        high_[at] = axis.weight[x];
      } else {
        extra_.push_back(int32_t(x));
      }
    }
    for (int64_t block = 0; block < pitch; block += 16) {
      int32_t first = int32_t(axis.target) - 1, last = 0;
      for (int64_t k = 0; k < phases; ++k) {
        for (int64_t n = block; n < block + 16; ++n) {
          const int32_t x = column_[k * pitch + n];
          if (x >= 0) first = std::min(first, x), last = std::max(last, x);
        }
      }
      for (int64_t k = 0; k < phases; ++k) {
        for (int64_t n = block; n < block + 16; ++n) {  // a node without this phase reads any column with weight zero
          if (column_[k * pitch + n] < 0) column_[k * pitch + n] = first;
        }
      }
      base_.push_back(last - first < 64 ? first : -1);
    }
    fold_ = {phases,       pitch,       int64_t(extra_.size()), column_.data(),
             base_.data(), low_.data(), high_.data(),           extra_.data()};
  }
  FoldTable(const FoldTable&) = delete;
  FoldTable& operator=(const FoldTable&) = delete;

  const Fold<T>& fold() const { return fold_; }

 private:
  std::vector<int32_t> column_, base_, extra_;
  std::vector<T> low_, high_;
  Fold<T> fold_;
};

// Bands of at least `least` output rows that end where the nodes change: few where an output row is a row of nodes,
// since bands then share no row of the gradient and hold less of it in the caches, more where they share rows.
template <class T>
class BandTable {
 public:
  explicit BandTable(const Axis<T>& rows) : BandTable(rows, rows.same() ? kSameRows : kRows) {}
  BandTable(const Axis<T>& rows, int64_t least) : row_{0}, node_{0} {
    for (int64_t y = 1; y < rows.target; ++y) {
      if (y - row_.back() >= least && rows.low[y] != rows.low[y - 1]) {
        row_.push_back(y);
        node_.push_back(rows.low[y]);
      }
    }
    row_.push_back(rows.target);
    node_.push_back(rows.source);
    bands_ = {int64_t(row_.size()) - 1, row_.data(), node_.data()};
  }
  BandTable(const BandTable&) = delete;
  BandTable& operator=(const BandTable&) = delete;

  const Bands& bands() const { return bands_; }

  // Output rows of the largest band.
  int64_t max_height() const {
    int64_t most = 0;
    for (int64_t i = 0; i < bands_.count; ++i) most = std::max(most, row_[i + 1] - row_[i]);
    return most;
  }

  // Most rows of nodes that one band of these touches, for a map interpolated along `rows`.
  int64_t max_rows(const Axis<T>& rows) const {
    int64_t most = 0;
    for (int64_t i = 0; i < bands_.count; ++i) {
      most = std::max<int64_t>(most, rows.low[row_[i + 1] - 1] - rows.low[row_[i]] + 2);
    }
    return most;
  }

 private:
  static constexpr int64_t kRows = 32, kSameRows = 8;

  std::vector<int64_t> row_, node_;
  Bands bands_;
};

// Diagonal and off-diagonal of the tridiagonal W'W, W being the interpolation matrix [target, source] of an axis.
template <class T>
struct GramTable {
  std::vector<T> diagonal, pairs;

  explicit GramTable(const Axis<T>& axis) : diagonal(axis.source + kPadding), pairs(axis.source + kPadding) {
    std::vector<double> d(axis.source), p(axis.source);
    for (int64_t i = 0; i < axis.target; ++i) {
      const double high = axis.weight[i], low = 1 - high;
      d[axis.low[i]] += low * low;
      if (high != 0) {
        d[axis.low[i] + 1] += high * high;
        p[axis.low[i]] += low * high;
      }
    }
    std::copy(d.begin(), d.end(), diagonal.begin());
    std::copy(p.begin(), p.end(), pairs.begin());
  }
};

}  // namespace psf
