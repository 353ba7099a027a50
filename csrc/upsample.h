// Softmax numerators of a bilinearly upsampled map, one vector of adjacent output pixels at a time.
//
// Between two rows of nodes every logit is linear in y, so its exponential is a geometric sequence: from one output
// row to the next it takes one multiplication. The upsampled map itself is recomputed where it is needed.
#pragma once

#include "formulas.h"
#include "view.h"

namespace psf::PSF_ISA {
namespace {

constexpr int64_t kAnchor = 8;     // rows after which the sequence starts from an exact exponential again
constexpr int64_t kShortest = 3;   // rows from which on a sequence is cheaper than one exponential a row
constexpr double kSafeRange = 90;  // of logits / ln 2: one shift keeps every exponential, and a weight up to 2^37
                                   // divided by a sum of them, a normal number

// Hands out pieces of one block of memory; with a null block it only counts.
class Arena {
 public:
  explicit Arena(void* block) : block_(static_cast<char*>(block)) {}

  template <class T>
  T* take(int64_t count) {
    char* piece = block_ ? block_ + used_ : nullptr;
    used_ += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    return reinterpret_cast<T*>(piece);
  }
  int64_t used() const { return used_; }

 private:
  char* block_;
  int64_t used_ = 0;
};

// Two sums that are formed together.
template <class T>
struct Pair {
  Vec<T> first, second;
  void operator+=(const Pair& other) {
    first += other.first;
    second += other.second;
  }
};

// Sum f(0) + ... + f(count - 1) in four chains, in a fixed order. Sum is a vector or a Pair.
template <class Sum, class F>
inline Sum sum_over(int64_t count, F&& f) {
  Sum sums[4] = {};
  int64_t c = 0;
  for (; c + 4 <= count; c += 4) {
    for (int i = 0; i < 4; ++i) sums[i] += f(c + i);
  }
  for (; c < count; ++c) sums[0] += f(c);
  sums[0] += sums[1];
  sums[2] += sums[3];
  sums[0] += sums[2];
  return sums[0];
}

template <class T, class F>
inline Vec<T> max_over(int64_t count, F&& f) {
  Vec<T> best[2] = {f(0), f(count - 1)};
  int64_t c = 1;
  for (; c + 2 <= count; c += 2) {
    best[0] = max(f(c), best[0]);
    best[1] = max(f(c + 1), best[1]);
  }
  return max(best[0], best[1]);
}

// The rows of a map that a band touches, as T in units of ln 2, bounded below, any layout and dtype.
template <class T>
class StagedMap {
 public:
  StagedMap(const Map<T>& map, int64_t classes, Arena& arena)
      : map_(map),
        classes_(classes),
        pitch_((map.columns.source + 2 * kLanes<T> - 1) / kLanes<T> * kLanes<T>),
        rows_(arena.take<T>(map.max_rows * classes * pitch_)),
        low_(arena.take<Vec<T>>(map.max_rows)),
        high_(arena.take<Vec<T>>(map.max_rows)),
        wrong_(arena.take<Int<T>>(map.max_rows)),
        lowest_(arena.take<T>(map.max_rows)),
        highest_(arena.take<T>(map.max_rows)) {}

  // Stage what output rows [begin, end) of an image interpolate.
  void stage(int64_t image, int64_t begin, int64_t end) {
    first_ = map_.rows.low[begin];
    const int64_t last = last_node(map_.rows.low[end - 1]);
    const View& view = map_.view;
    const int64_t size = view.dtype == Dtype::f64 ? 8 : view.dtype == Dtype::f32 ? 4 : 2;
    const int64_t width = map_.columns.source;
    const T factor = map_.factor[image] * T(kLog2e);
    for (int64_t i = 0; i <= last - first_; ++i) {
      low_[i] = splat(T(__builtin_inf()));
      high_[i] = -low_[i];
      wrong_[i] = Int<T>{};
    }
    for (int64_t c = 0; c < classes_; ++c) {
      for (int64_t i = 0; i <= last - first_; ++i) {
        const int64_t offset = image * view.strides[0] + c * view.strides[1] + (first_ + i) * view.strides[2];
        T* to = rows_ + (i * classes_ + c) * pitch_;
        load_row(static_cast<const char*>(view.data) + offset * size, view.dtype, view.strides[3], width, to);
        for (int64_t x = width; x < pitch_; ++x) to[x] = to[width - 1];
        Vec<T> low = low_[i], high = high_[i];
        Int<T> wrong = wrong_[i];
        for (int64_t x = 0; x < width; x += kLanes<T>) {
          const Vec<T> z = scaled_logit(load(to + x), factor);
          store(to + x, z);
          low = z < low ? z : low;
          high = z > high ? z : high;
          wrong |= z != z;
        }
        low_[i] = low;
        high_[i] = high;
        wrong_[i] = wrong;
      }
    }
    for (int64_t i = 0; i <= last - first_; ++i) {
      T &lowest = lowest_[i] = low_[i][0], &highest = highest_[i] = high_[i][0];
      for (int k = 0; k < kLanes<T>; ++k) {
        lowest = low_[i][k] < lowest ? low_[i][k] : lowest;
        highest = wrong_[i][k] ? T(__builtin_inf()) : high_[i][k] > highest ? high_[i][k] : highest;
      }
    }
  }

  const Map<T>& map() const { return map_; }
  int64_t classes() const { return classes_; }
  int64_t pitch() const { return pitch_; }
  int64_t last_node(int64_t node) const { return node + 1 < map_.rows.source ? node + 1 : node; }
  // Row `node` of class 0; the next class lies one pitch further.
  const T* row(int64_t node) const { return rows_ + (node - first_) * classes_ * pitch_; }
  T lowest(int64_t node) const { return lowest_[node - first_]; }
  T highest(int64_t node) const { return highest_[node - first_]; }

 private:
  const Map<T>& map_;
  const int64_t classes_, pitch_;
  T* const rows_;                     // [max_rows, C, pitch]
  Vec<T>*const low_, *const high_;    // [max_rows] while staging
  Int<T>* const wrong_;               // [max_rows] where not a number
  T *const lowest_, *const highest_;  // [max_rows]
  int64_t first_ = 0;
};

// Interpolation along x for one vector of adjacent output columns.
template <class T>
class Columns {
 public:
  void begin(const Axis<T>& axis, int64_t x) {
    same_ = axis.same();
    base_ = axis.low[x];
    near_ = true;
    for (int i = 0; i < kLanes<T>; ++i) {
      const int64_t at = x + i < axis.target ? x + i : axis.target - 1;
      weight_[i] = axis.weight[at];
      low_[i] = typename Simd<T>::Lane(axis.low[at] - base_);
      high_[i] = low_[i] + (axis.weight[at] != T(0));
      near_ = near_ && high_[i] < kLanes<T>;
    }
  }

  // Whether a column is a node, so that load(first(row)) is expand(row) of finite nodes.
  bool same() const { return same_; }
  const T* first(const T* row) const { return row + base_; }

  Vec<T> expand(const T* row) const {
    Vec<T> low, high;
    row += base_;
#if defined(__AVX2__)
    if constexpr (sizeof(T) == 4) {
      if (near_) {
        const Vec<T> nodes = load(row);
#if defined(__AVX512F__)
        constexpr __mmask16 kAll = 0xffff;  // the unmasked form makes GCC 12 warn of an uninitialised vector
        low = Vec<T>(_mm512_maskz_permutexvar_ps(kAll, __m512i(low_), __m512(nodes)));
        high = Vec<T>(_mm512_maskz_permutexvar_ps(kAll, __m512i(high_), __m512(nodes)));
#else
        low = Vec<T>(_mm256_permutevar8x32_ps(__m256(nodes), __m256i(low_)));
        high = Vec<T>(_mm256_permutevar8x32_ps(__m256(nodes), __m256i(high_)));
#endif
        return interpolate(low, high, weight_);
      }
    }
#endif
    for (int i = 0; i < kLanes<T>; ++i) {
      low[i] = row[low_[i]];
      high[i] = row[high_[i]];
    }
    return interpolate(low, high, weight_);
  }

 private:
  int64_t base_ = 0;
  bool same_ = false;
  bool near_ = false;  // all nodes lie in one vector
  Int<T> low_ = {}, high_ = {};
  Vec<T> weight_ = {};
};

// One vector of columns of a staged map, walked down row by row. After row(y), softmax = e[c] / sum.
template <class T>
class Upsampled {
 public:
  Upsampled(const StagedMap<T>& staged, Arena& arena)
      : staged_(staged),
        classes_(staged.classes()),
        upper_(arena.take<Vec<T>>(classes_)),
        lower_(arena.take<Vec<T>>(classes_)),
        e_(arena.take<Vec<T>>(classes_)),
        ratio_(arena.take<Vec<T>>(classes_)) {}

  void begin_columns(int64_t x) {
    columns_.begin(staged_.map().columns, x);
    node_ = next_ = -1;
  }

  // Compute e and sum for output row y. Not inlined, so that its loops are compiled alike for every caller.
  [[gnu::noinline]] void row(int64_t y) {
    const Axis<T>& rows = staged_.map().rows;
    if (enter(y)) {
      geometric_ = safe_ && rows_between_nodes(y) >= kShortest;
      if (columns_.same()) {
        exponentials<Lower::same>(rows.step);
      } else {
        exponentials<Lower::expanded>(rows.step);
      }
    } else if (geometric_ && rows.steady[y] && age_ < kAnchor) {
      ++age_;
      sum_ = sum_over<Vec<T>>(classes_, [&](int64_t c) { return e_[c] *= ratio_[c]; });
    } else {
      exponentials<Lower::kept>(rows.step);
    }
  }

  // For norm="pixel": compute the sum of squared logits of output row y first, then e and sum of scaled ones.
  Vec<T> squares(int64_t y) {
    move_to(y);
    const auto square = [&](int64_t c) {
      e_[c] = value(c);
      return e_[c] * e_[c];
    };
    return sum_over<Vec<T>>(classes_, square) * T(kLn2 * kLn2);
  }
  void scaled_row(Vec<T> scale) {
    sum_ = sum_over<Vec<T>>(classes_, [&](int64_t c) { return e_[c] = exp2_within(e_[c] * scale); });
  }

  // Make value(c) that of output row y.
  void move_to(int64_t y) {
    if (!enter(y)) return;
    for (int64_t c = 0; c < classes_; ++c) lower<Lower::expanded>(c);
  }

  // The upsampled logit / ln 2 of class c, and of one lane of it.
  Vec<T> value(int64_t c) const { return interpolate(upper_[c], lower_[c], weight_); }
  T value(int64_t c, int lane) const { return upper_[c][lane] + weight_[lane] * (lower_[c][lane] - upper_[c][lane]); }

  // The values at the nodes above and below: value(c) = (1 - weight) upper[c] + weight lower[c].
  const Vec<T>* upper() const { return upper_; }
  const Vec<T>* lower() const { return lower_; }
  Vec<T> weight() const { return weight_; }

  const Vec<T>* e() const { return e_; }
  Vec<T> sum() const { return sum_; }
  Vec<T> log2_sum() const { return log2(sum_) + shift_; }
  int64_t node() const { return node_; }

 private:
  // Find the nodes of output row y; true if they are others than before: then lower_ is to be filled next.
  bool enter(int64_t y) {
    const Axis<T>& rows = staged_.map().rows;
    weight_ = splat(rows.weight[y]);
    if (rows.low[y] == node_) return false;
    const bool adjacent = rows.low[y] == next_;
    node_ = rows.low[y];
    next_ = staged_.last_node(node_);
    next_row_ = staged_.row(next_);
    if (adjacent) {
      Vec<T>* const swapped = upper_;
      upper_ = lower_;
      lower_ = swapped;
    } else {
      const T* row = staged_.row(node_);
      for (int64_t c = 0; c < classes_; ++c) upper_[c] = columns_.expand(row + c * staged_.pitch());
    }
    const T highest = staged_.highest(node_) > staged_.highest(next_) ? staged_.highest(node_) : staged_.highest(next_);
    const T lowest = staged_.lowest(node_) < staged_.lowest(next_) ? staged_.lowest(node_) : staged_.lowest(next_);
    safe_ = highest - lowest <= T(kSafeRange);
    shift_ = splat(highest);
    return true;
  }

  // Where the values at the nodes below come from.
  enum class Lower { kept, expanded, same };

  template <Lower kLower>
  Vec<T> lower(int64_t c) {
    const T* row = next_row_ + c * staged_.pitch();
    if constexpr (kLower == Lower::expanded) lower_[c] = columns_.expand(row);
    if constexpr (kLower == Lower::same) lower_[c] = load(columns_.first(row));
    return lower_[c];
  }

  // Compute e and sum from the nodes, and for a sequence that begins its ratio.
  template <Lower kLower>
  void exponentials(T step) {
    age_ = 0;
    if (!safe_) {
      shift_ = max_over<T>(classes_,
                           [&](int64_t c) { return e_[c] = upper_[c] + weight_ * (lower<kLower>(c) - upper_[c]); });
      sum_ = sum_over<Vec<T>>(classes_, [&](int64_t c) { return e_[c] = exp2(e_[c] - shift_); });
    } else if (kLower != Lower::kept && geometric_) {
      sum_ = sum_over<Vec<T>>(classes_, [&](int64_t c) {
        const Vec<T> upper = upper_[c], difference = lower<kLower>(c) - upper;
        ratio_[c] = exp2_within(difference * step);
        return e_[c] = exp2_within(weight_ * difference + (upper - shift_));
      });
    } else {
      sum_ = sum_over<Vec<T>>(classes_, [&](int64_t c) {
        const Vec<T> upper = upper_[c];
        return e_[c] = exp2_within(weight_ * (lower<kLower>(c) - upper) + (upper - shift_));
      });
    }
  }

  // Output rows from y on that lie between the same nodes, counted up to kShortest.
  int64_t rows_between_nodes(int64_t y) const {
    const Axis<T>& rows = staged_.map().rows;
    int64_t end = y + 1;
    while (end < rows.target && end < y + kShortest && rows.low[end] == node_) ++end;
    return end - y;
  }

  const StagedMap<T>& staged_;
  const int64_t classes_;
  Vec<T>*upper_, *lower_;          // [C]
  Vec<T>*const e_, *const ratio_;  // [C]
  Columns<T> columns_;
  const T* next_row_ = nullptr;
  Vec<T> weight_ = {}, shift_ = {}, sum_ = {};
  int64_t node_ = -1, next_ = -1, age_ = 0;
  bool safe_ = false, geometric_ = false;
};

}  // namespace
}  // namespace psf::PSF_ISA
