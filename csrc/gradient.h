// The gradient at the low resolution: the transpose of the upsampling, without scatter and without atomics.
//
// Going down a vector of columns, the gradient g of an output row adds g to `sum` and weight * g to `below`; when the
// nodes change, sum - below belongs to the upper node and below to the lower one. The rows so gathered, still of the
// output's width, are folded along x once per row of nodes. Where a pixel is a node they are the gradient as they are,
// and go to the result a class at a time: by columns, its rows would meet in the same sets of the first-level cache.
#pragma once

#include <algorithm>

#include "upsample.h"

namespace psf::PSF_ISA {
namespace {

template <class T>
class GradientBand {
 public:
  GradientBand(const LossJob<T>& job, Arena& arena)
      : job_(job),
        classes_(job.frame.classes),
        pitch_((job.frame.width + kLanes<T> - 1) / kLanes<T> * kLanes<T>),
        same_(job.student.same()),
        sum_(arena.take<Vec<T>>(classes_)),
        below_(arena.take<Vec<T>>(classes_)),
        carry_(arena.take<Vec<T>>(classes_)),
        rows_(arena.take<T>(job.gradient ? job.student.max_rows * classes_ * pitch_ + kReadBehind : 0)),
        high_(arena.take<Vec<T>>(classes_)) {}

  void begin_band(int64_t item) {
    const Bands& bands = job_.frame.bands;
    item_ = item;
    image_ = item / bands.count;
    band_ = item % bands.count;
    first_ = job_.student.rows.low[bands.row[band_]];
    const int64_t low = job_.student.rows.low[bands.row[band_ + 1] - 1];
    last_ = !same_ && low + 1 < job_.student.rows.source ? low + 1 : low;
  }

  void begin_columns(int64_t x) {
    x_ = x;
    next_ = first_;
    if (same_) {
      here_ = row(first_, 0) + x;
      return;
    }
    for (int64_t c = 0; c < classes_; ++c) sum_[c] = below_[c] = carry_[c] = Vec<T>{};
  }

  // Say that the next gradients belong to the output rows after `node`.
  void move_to(int64_t node) {
    if (node != next_) flush(node);
  }

  // Return use(add), where add(c, g) adds the gradient g of class c, of an output row with the given weight of the
  // lower node. It is to be called once for each class; more may be added to single lanes afterwards.
  template <class Use>
  auto adding(Vec<T> weight, Use&& use) {
    if (same_) return use([to = here_, pitch = pitch_](int64_t c, Vec<T> g) { store(to + c * pitch, g); });
    return use([this, weight](int64_t c, Vec<T> g) {
      sum_[c] += g;
      below_[c] += g * weight;
    });
  }
  void add(int64_t c, int lane, T g, T weight) {
    if (same_) {
      here_[c * pitch_ + lane] += g;
      return;
    }
    sum_[c][lane] += g;
    below_[c][lane] += g * weight;
  }

  void end_columns() {
    flush(next_ + 1);
    for (; next_ <= last_; ++next_) put_carry();
  }

  // Fold the rows of the band into the gradient, the row shared with the next band into the overlap.
  void end_band() {
    const Bands& bands = job_.frame.bands;
    const int64_t height = job_.student.rows.source, width = job_.student.columns.source;
    const int64_t begin = bands.node[band_], end = bands.node[band_ + 1];
    T* const map = job_.gradient + image_ * classes_ * height * width;
    if (same_) {
      for (int64_t c = 0; c < classes_; ++c) {
        for (int64_t node = begin; node < end; ++node) {
          std::copy_n(row(node, c), width, map + (c * height + node) * width);
        }
      }
      return;
    }
    T* const overlap = job_.overlap + item_ * classes_ * width;
    for (int64_t node = begin; node < end; ++node) put(node, map + node * width, height * width);
    put(last_ < end ? -1 : last_, overlap, width);
  }

 private:
  T* row(int64_t node, int64_t c) { return rows_ + ((node - first_) * classes_ + c) * pitch_; }

  // Store the row of node `next_`, unless add() has, and go to `node`; rows between them lie between no output rows.
  void flush(int64_t node) {
    if (same_) {
      here_ += (node - next_) * classes_ * pitch_;
      next_ = node;
      return;
    }
    const bool last = next_ == last_;  // no lower node: below_ is zero
    for (int64_t c = 0; c < classes_; ++c) {
      store(row(next_, c) + x_, carry_[c] + (sum_[c] - below_[c]));
      carry_[c] = last ? Vec<T>{} : below_[c];
      sum_[c] = below_[c] = Vec<T>{};
    }
    for (++next_; next_ < node; ++next_) put_carry();
  }

  void put_carry() {
    for (int64_t c = 0; c < classes_; ++c) {
      store(row(next_, c) + x_, carry_[c]);
      carry_[c] = Vec<T>{};
    }
  }

  static Vec<T> gather(const T* from, const int32_t* index) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) {
      const __m512i at = _mm512_loadu_si512(index);
      return Vec<T>(_mm512_mask_i32gather_ps(_mm512_setzero_ps(), 0xffff, at, from, 4));
    }
#elif defined(__AVX2__)
    if constexpr (sizeof(T) == 4) {
      return Vec<T>(_mm256_i32gather_ps(from, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index)), 4));
    }
#endif
    Vec<T> v;
    for (int i = 0; i < kLanes<T>; ++i) v[i] = from[index[i]];
    return v;
  }

  // Fold the row of `node` to `narrow`, classes `stride` apart; zero where the band has no such row.
  void put(int64_t node, T* narrow, int64_t stride) {
    if (node >= first_ && node <= last_) return fold(row(node, 0), narrow, stride);
    for (int64_t c = 0; c < classes_; ++c) {
      for (int64_t x = 0; x < job_.student.columns.source; ++x) narrow[c * stride + x] = T(0);
    }
  }

  void fold(const T* wide, T* narrow, int64_t stride) {
    const Axis<T>& axis = job_.student.columns;
    const Fold<T>& fold = job_.fold;
    for (int64_t c = 0; c < classes_; ++c) high_[c] = Vec<T>{};
    for (int64_t n = 0; n < axis.source; n += kLanes<T>) {
      const int64_t nodes = axis.source - n < kLanes<T> ? axis.source - n : kLanes<T>;
      for (int64_t c = 0; c < classes_; ++c) {
        Vec<T> low = {}, high = {};
        fold_nodes(wide + c * pitch_, n, low, high);
        const T before = high_[c][kLanes<T> - 1];  // what node n - 1 gives to node n
        high_[c] = high;
        low += shifted(high, before);
        T* const to = narrow + c * stride + n;
        if (nodes == kLanes<T>) {
          store(to, low);
        } else {
          for (int64_t i = 0; i < nodes; ++i) to[i] = low[i];
        }
      }
    }
    for (int64_t i = 0; i < fold.extras; ++i) {
      const int64_t x = fold.extra[i], node = axis.low[x];
      for (int64_t c = 0; c < classes_; ++c) {
        narrow[c * stride + node] += wide[c * pitch_ + x] * (T(1) - axis.weight[x]);
        if (axis.weight[x] != T(0)) narrow[c * stride + node + 1] += wide[c * pitch_ + x] * axis.weight[x];
      }
    }
  }

  // (first, v[0], v[1], ...)
  static Vec<T> shifted(Vec<T> v, T first) {
    Vec<T> result;
    result[0] = first;
    for (int i = 1; i < kLanes<T>; ++i) result[i] = v[i - 1];
    return result;
  }

  // Add up what the columns give to kLanes nodes from n on, and to the node after each of them.
  void fold_nodes(const T* wide, int64_t n, Vec<T>& low, Vec<T>& high) const {
    const Fold<T>& fold = job_.fold;
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) {  // shuffles of the 64 columns are several times faster than gathers
      const int32_t base = fold.base[n / 16];
      if (base >= 0) {
        __m512 columns[4];
        for (int i = 0; i < 4; ++i) columns[i] = _mm512_loadu_ps(wide + base + 16 * i);
        for (int64_t k = 0; k < fold.phases; ++k) {
          const int64_t at = k * fold.pitch + n;
          const __m512i index = _mm512_sub_epi32(_mm512_loadu_si512(fold.column + at), _mm512_set1_epi32(base));
          const __mmask16 behind = _mm512_test_epi32_mask(index, _mm512_set1_epi32(32));
          const __m512 front = _mm512_permutex2var_ps(columns[0], index, columns[1]);
          const __m512 back = _mm512_permutex2var_ps(columns[2], index, columns[3]);
          const Vec<T> g = Vec<T>(_mm512_mask_blend_ps(behind, front, back));
          low += g * load(fold.low + at);
          high += g * load(fold.high + at);
        }
        return;
      }
    }
#endif
    for (int64_t k = 0; k < fold.phases; ++k) {
      const int64_t at = k * fold.pitch + n;
      const Vec<T> g = gather(wide, fold.column + at);
      low += g * load(fold.low + at);
      high += g * load(fold.high + at);
    }
  }

  static constexpr int64_t kReadBehind = 64;  // fold_nodes reads whole vectors

  const LossJob<T>& job_;
  const int64_t classes_, pitch_;
  const bool same_;
  Vec<T>*const sum_, *const below_, *const carry_;  // [C]
  T* const rows_;                                   // [max_rows, C, pitch]
  Vec<T>* const high_;                              // [C] while folding
  int64_t item_ = 0, image_ = 0, band_ = 0;
  int64_t first_ = 0, last_ = 0, next_ = 0, x_ = 0;
  T* here_ = nullptr;  // class 0 of the pixels, if same_
};

}  // namespace
}  // namespace psf::PSF_ISA
