// Convolution of each channel with a filter of its own, channels last: one vector of channels at a time.
//
// A band copies the rows it needs of its channels into scratch memory, between zeros for the padding, since neighbours
// in a picture of many channels lie so far apart that they share sets of the cache. Taps that fall on padding
// wherever the filter stands, as those of a wide dilation on a small map do, are left out beforehand.
#pragma once

#include "kernels_cpu.h"
#include "upsample.h"
#include "vec.h"

namespace psf::PSF_ISA {
namespace {

constexpr int kMostTaps = 7;  // of a row of the filter, for which there is unrolled code
constexpr int64_t kTile = 8;  // pixels whose sums stay in registers

template <int N>
struct Taps {
  static constexpr int count = N;
};

// Call `use` with Taps<count>, or with Taps<0> if there are more than kMostTaps.
template <class Use>
inline void with_taps(int64_t count, Use&& use) {
  switch (count) {
    case 1:
      return use(Taps<1>());
    case 2:
      return use(Taps<2>());
    case 3:
      return use(Taps<3>());
    case 4:
      return use(Taps<4>());
    case 5:
      return use(Taps<5>());
    case 6:
      return use(Taps<6>());
    case kMostTaps:
      return use(Taps<kMostTaps>());
    default:
      return use(Taps<0>());
  }
}

// A vector of channels from memory, where only the first `lanes` of them exist, and back.
template <class T>
inline Vec<T> load_channels(const T* from, int64_t lanes) {
  if (lanes == kLanes<T>) return load(from);
  Vec<T> v = {};
  for (int64_t i = 0; i < lanes; ++i) v[i] = from[i];
  return v;
}

template <class T>
inline void store_channels(T* to, Vec<T> v, int64_t lanes) {
  if (lanes == kLanes<T>) return store(to, v);
  for (int64_t i = 0; i < lanes; ++i) to[i] = v[i];
}

// The rows of a map that a band of output rows sees, for one vector of channels.
template <class T>
class StagedRows {
 public:
  StagedRows(const DepthwiseJob<T>& job, Arena& arena)
      : job_(job),
        rows_(arena.take<T>(job.staged_rows * pitch())),
        left_(job.columns.first * job.columns.dilation - job.columns.padding),
        begin_(left_ > 0 ? (left_ + job.columns.spread - 1) / job.columns.spread : 0),
        end_((left_ + job.staged_columns + job.columns.spread - 1) / job.columns.spread) {
    if (end_ < begin_) end_ = begin_;
    if (end_ > job.columns.source) end_ = job.columns.source;
  }

  int64_t pitch() const { return job_.staged_columns * kLanes<T>; }

  void stage(int64_t image, int64_t channel, int64_t lanes, int64_t begin, int64_t end) {
    const DepthwiseAxis &rows = job_.rows, &columns = job_.columns;
    const int64_t lowest = begin * rows.stride - rows.padding;
    const int64_t highest = (end - 1) * rows.stride - rows.padding + (rows.taps - 1) * rows.dilation;
    first_ = lowest > 0 ? (lowest + rows.spread - 1) / rows.spread : 0;
    const int64_t last = highest < 0                           ? -1
                         : highest / rows.spread < rows.source ? highest / rows.spread
                                                               : rows.source - 1;
    const int64_t inside = (begin_ * columns.spread - left_) * kLanes<T>, step = columns.spread * kLanes<T>;
    const int64_t behind = end_ > begin_ ? inside + (end_ - 1 - begin_) * step + kLanes<T> : 0;
    for (int64_t y = first_; y <= last; ++y) {
      T* const row = rows_ + (y - first_) * pitch();
      if (columns.spread > 1) __builtin_memset(row, 0, size_t(behind) * sizeof(T));
      if (behind) __builtin_memset(row, 0, size_t(inside) * sizeof(T));
      __builtin_memset(row + behind, 0, size_t(pitch() - behind) * sizeof(T));
      const T* from = job_.input + ((image * rows.source + y) * columns.source + begin_) * job_.channels + channel;
      T* to = row + inside;
      for (int64_t x = begin_; x < end_; ++x, from += job_.channels, to += step) {
        store(to, load_channels(from, lanes));
      }
    }
  }

  // The staged row below the tap `tap` of output row y from its first live tap on; null in the padding.
  const T* below(int64_t y, int64_t tap) const {
    const DepthwiseAxis& rows = job_.rows;
    int64_t at = y * rows.stride - rows.padding + tap * rows.dilation;
    if (at < 0) return nullptr;
    if (rows.spread > 1) {
      if (at % rows.spread) return nullptr;
      at /= rows.spread;
    }
    return at < rows.source ? rows_ + (at - first_) * pitch() : nullptr;
  }

 private:
  const DepthwiseJob<T>& job_;
  T* rows_;
  int64_t left_;         // of the padded columns, the one staged first
  int64_t begin_, end_;  // columns of the source that are staged
  int64_t first_ = 0;    // row of the source staged first
};

// Output rows [begin, end) of one vector of channels of one image.
template <class T>
struct DepthwiseItem {
  int64_t image, block, channel, lanes, begin, end;

  DepthwiseItem(const DepthwiseJob<T>& job, int64_t item) {
    const int64_t bands = (job.rows.target + job.band - 1) / job.band;
    block = item % job.blocks;
    begin = item / job.blocks % bands * job.band;
    end = begin + job.band < job.rows.target ? begin + job.band : job.rows.target;
    image = item / job.blocks / bands;
    channel = block * kLanes<T>;
    lanes = job.channels - channel < kLanes<T> ? job.channels - channel : kLanes<T>;
  }
};

// The convolution of one band.
template <class T>
class DepthwiseBand {
 public:
  DepthwiseBand(const DepthwiseJob<T>& job, void* scratch)
      : job_(job), arena_(scratch), staged_(job, arena_), terms_(arena_.take<Term>(job.rows.taps)) {}

  int64_t scratch() const { return arena_.used(); }

  void run(int64_t index) {
    const DepthwiseItem<T> item(job_, index);
    staged_.stage(item.image, item.channel, item.lanes, item.begin, item.end);
    const int64_t width = job_.columns.target, row_taps = job_.columns.live * kLanes<T>;
    const T* const filter = job_.filter + item.block * job_.rows.taps * row_taps;
    start_ = job_.bias ? load(job_.bias + item.channel) : Vec<T>{};
    lanes_ = item.lanes;
    for (int64_t y = item.begin; y < item.end; ++y) {
      count_ = 0;
      for (int64_t ky = 0; ky < job_.rows.taps; ++ky) {
        const T* const row = staged_.below(y, ky);
        if (row) terms_[count_++] = {row, filter + ky * row_taps};
      }
      T* const to = job_.output + ((item.image * job_.rows.target + y) * width) * job_.channels + item.channel;
      with_taps(job_.columns.live, [&](auto taps) {
        int64_t x = 0;
        for (; x + kTile / 2 < width; x += kTile) tile<decltype(taps)::count, kTile>(x, to);
        if (x < width) tile<decltype(taps)::count, kTile / 2>(x, to);
      });
    }
  }

 private:
  // A row of the source and the row of the filter that it is multiplied by.
  struct Term {
    const T *row, *weights;
  };

  template <int Count, int64_t Pixels>
  void tile(int64_t x, T* to) const {
    const int64_t step = job_.columns.dilation * kLanes<T>, stride = job_.columns.stride * kLanes<T>;
    const int64_t taps = Count ? Count : job_.columns.live;
    Vec<T> sum[Pixels];
    for (int64_t i = 0; i < Pixels; ++i) sum[i] = start_;
    for (const Term* term = terms_; term != terms_ + count_; ++term) {
#pragma GCC unroll 7
      for (int64_t kx = 0; kx < taps; ++kx) {
        const Vec<T> weight = load(term->weights + kx * kLanes<T>);
        const T* const from = term->row + x * stride + kx * step;
#pragma GCC unroll 8
        for (int64_t i = 0; i < Pixels; ++i) sum[i] += weight * load(from + i * stride);
      }
    }
    T* pixel = to + x * job_.channels;
    const int64_t left = job_.columns.target - x;
#pragma GCC unroll 8
    for (int64_t i = 0; i < Pixels; ++i, pixel += job_.channels) {
      if (i < left) store_channels(pixel, sum[i], lanes_);
    }
  }

  const DepthwiseJob<T>& job_;
  Arena arena_;
  StagedRows<T> staged_;
  Term* terms_;  // [count_] of the output row at hand
  int64_t count_ = 0;
  Vec<T> start_ = {};
  int64_t lanes_ = 0;
};

// One band's share of the gradient of the filter.
template <class T>
class DepthwiseFilterBand {
 public:
  DepthwiseFilterBand(const DepthwiseJob<T>& job, void* scratch)
      : job_(job), arena_(scratch), staged_(job, arena_), upstream_(arena_.take<T>(even(job) * kLanes<T>)) {}

  int64_t scratch() const { return arena_.used(); }

  void run(int64_t index) {
    const DepthwiseItem<T> item(job_, index);
    const int64_t width = job_.columns.target, live = job_.columns.live;
    staged_.stage(item.image, item.channel, item.lanes, item.begin, item.end);
    T* const sums = job_.partial + index * job_.rows.taps * live * kLanes<T>;
    __builtin_memset(sums, 0, size_t(job_.rows.taps * live * kLanes<T>) * sizeof(T));
    __builtin_memset(upstream_, 0, size_t(even(job_) * kLanes<T>) * sizeof(T));
    for (int64_t y = item.begin; y < item.end; ++y) {
      const T* from = job_.upstream + ((item.image * job_.rows.target + y) * width) * job_.channels + item.channel;
      for (int64_t x = 0; x < width; ++x, from += job_.channels) {
        store(upstream_ + x * kLanes<T>, load_channels(from, item.lanes));
      }
      for (int64_t ky = 0; ky < job_.rows.taps; ++ky) {
        const T* const row = staged_.below(y, ky);
        if (!row) continue;
        with_taps(live, [&](auto taps) {
          constexpr int kCount = decltype(taps)::count;
          if constexpr (kCount > 0) {
            add<kCount>(row, sums + ky * live * kLanes<T>);
          } else {
            for (int64_t kx = 0; kx < live; ++kx) {
              add<1>(row + kx * job_.columns.dilation * kLanes<T>, sums + (ky * live + kx) * kLanes<T>);
            }
          }
        });
      }
    }
  }

 private:
  static int64_t even(const DepthwiseJob<T>& job) { return (job.columns.target + 1) / 2 * 2; }

  // Add the products of a row of the map and the row of the upstream gradient to the sums of `Count` taps.
  template <int Count>
  void add(const T* row, T* sums) const {
    const int64_t step = job_.columns.dilation * kLanes<T>, stride = job_.columns.stride * kLanes<T>;
    Vec<T> one[Count], other[Count];  // of every second pixel, so that an addition need not wait for the last one
    for (int k = 0; k < Count; ++k) {
      one[k] = load(sums + k * kLanes<T>);
      other[k] = Vec<T>{};
    }
    for (int64_t x = 0; x < job_.columns.target; x += 2) {
      const Vec<T> here = load(upstream_ + x * kLanes<T>), next = load(upstream_ + (x + 1) * kLanes<T>);
      const T* const from = row + x * stride;
#pragma GCC unroll 7
      for (int k = 0; k < Count; ++k) {
        one[k] += here * load(from + k * step);
        other[k] += next * load(from + k * step + stride);
      }
    }
    for (int k = 0; k < Count; ++k) store(sums + k * kLanes<T>, one[k] + other[k]);
  }

  const DepthwiseJob<T>& job_;
  Arena arena_;
  StagedRows<T> staged_;
  T* upstream_;
};

}  // namespace
}  // namespace psf::PSF_ISA
