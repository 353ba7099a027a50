// CPU kernels: losses, fusion and prediction from low-resolution maps. No map of the output size is stored; each band
// keeps vectors of [C] pixels in the first-level cache. Compiled once per instruction set, see kernels_cpu.h.

#include "kernels_cpu.h"

#include "fusion.h"
#include "gradient.h"
#include "upsample.h"
#include "vec.h"

namespace psf::PSF_ISA {
namespace {

// Where an element of a view lies.
inline const char* element(const View& view, int64_t b, int64_t c, int64_t y, int64_t x) {
  const int64_t size = view.dtype == Dtype::f64 || view.dtype == Dtype::i64   ? 8
                       : view.dtype == Dtype::f32                             ? 4
                       : view.dtype == Dtype::f16 || view.dtype == Dtype::bf16 ? 2
                                                                               : 1;
  const int64_t* s = view.strides;
  return static_cast<const char*>(view.data) + (b * s[0] + c * s[1] + y * s[2] + x * s[3]) * size;
}

// n elements of a row from (b, c, y, x) on; zero in the lanes behind them.
template <class T>
inline Vec<T> load_pixels(const View& view, int64_t b, int64_t c, int64_t y, int64_t x, int64_t n) {
  Vec<T> v = {};
  load_row(element(view, b, c, y, x), view.dtype, view.strides[3], n, reinterpret_cast<T*>(&v));
  return v;
}

// The probabilities that a vector of pixels should have: class c at from + c * stride.
template <class T>
struct Target {
  const T* from;
  int64_t stride;
  Vec<T> operator[](int64_t c) const { return load(from + c * stride); }
};

template <class T>
class LossBand {
 public:
  LossBand(const LossJob<T>& job, void* scratch)
      : job_(job),
        classes_(job.frame.classes),
        arena_(scratch),
        staged_student_(job.student, classes_, arena_),
        student_(staged_student_, arena_),
        label_(job.fusion, job.label == Label::fused ? classes_ : 0, arena_),
        gradient_(job, arena_),
        target_(arena_.take<Vec<T>>(job.label == Label::target ? classes_ : 0)) {}

  int64_t scratch() const { return arena_.used(); }

  void run(int64_t item) {
    const Frame& frame = job_.frame;
    image_ = item / frame.bands.count;
    const int64_t band = item % frame.bands.count;
    const int64_t begin = frame.bands.row[band], end = frame.bands.row[band + 1];
    staged_student_.stage(image_, begin, end);
    if (job_.label == Label::fused) label_.stage(image_, begin, end);
    if (job_.gradient) gradient_.begin_band(item);
    double loss = 0, weight = 0;
    for (x_ = 0; x_ < frame.width; x_ += kLanes<T>) {
      pixels_ = frame.width - x_ < kLanes<T> ? frame.width - x_ : kLanes<T>;
      loss_ = weight_ = Vec<T>{};
      columns(begin, end);
      for (int i = 0; i < kLanes<T>; ++i) {
        loss += double(loss_[i]);
        weight += double(weight_[i]);
      }
    }
    if (job_.gradient) gradient_.end_band();
    job_.partial[2 * item] = loss;
    job_.partial[2 * item + 1] = weight;
  }

 private:
  void columns(int64_t begin, int64_t end) {
    end_ = end;
    student_.begin_columns(x_);
    if (job_.label == Label::fused) label_.begin_columns(x_);
    if (job_.gradient) gradient_.begin_columns(x_);
    for (y_ = begin; y_ < end; ++y_) {
      Vec<T> pixel_loss = {};
      switch (job_.label) {
        case Label::target:
          pixel_loss = target_row();
          break;
        case Label::classes:
          pixel_loss = classes_row();
          break;
        case Label::fused:
          pixel_loss = fused_row();
          break;
      }
      loss_ += pixel_loss;
      if (job_.loss) {
        T* to = job_.loss + (image_ * job_.frame.height + y_) * job_.frame.width + x_;
        for (int64_t i = 0; i < pixels_; ++i) to[i] = pixel_loss[i];
      }
    }
    if (job_.gradient) gradient_.end_columns();
  }

  // The weight of each pixel, zero behind the last one; it counts in the mean.
  Vec<T> given_weight() {
    Vec<T> w;
    if (job_.weight.data) {
      w = load_pixels<T>(job_.weight, image_, 0, y_, x_, pixels_);
    } else {
      for (int i = 0; i < kLanes<T>; ++i) w[i] = T(i < pixels_);
    }
    return w;
  }

  Vec<T> with_upstream(Vec<T> w) {
    return job_.upstream.data ? w * load_pixels<T>(job_.upstream, image_, 0, y_, x_, pixels_) : w;
  }

  Vec<T> target_row() {
    Vec<T> w = given_weight();
    weight_ += w;
    w = with_upstream(w);
    const View& view = job_.target;
    Target<T> target{reinterpret_cast<const T*>(target_), kLanes<T>};
    if (view.dtype == (sizeof(T) == 4 ? Dtype::f32 : Dtype::f64) && view.strides[3] == 1 && pixels_ == kLanes<T>) {
      target = {reinterpret_cast<const T*>(element(view, image_, 0, y_, x_)), view.strides[1]};
      const int64_t ahead = y_ + kPrefetch < end_ ? kPrefetch * view.strides[2] + kLanes<T> - 1 : 0;
      for (int64_t c = 0; c < classes_; ++c) __builtin_prefetch(target.from + c * target.stride + ahead);
    } else {
      for (int64_t c = 0; c < classes_; ++c) target_[c] = load_pixels<T>(view, image_, c, y_, x_, pixels_);
    }
    const Vec<T> total = sum_over<Vec<T>>(classes_, [&](int64_t c) { return target[c]; });
    student_.row(y_);
    return soft(target, w, w * total);
  }

  Vec<T> fused_row() {
    Vec<T> w = given_weight();
    weight_ += w;
    w = with_upstream(w);
    const bool thresholded = job_.threshold > T(0);
    label_.row(y_, thresholded || job_.hard);
    if (thresholded) w = label_.confidence() < job_.threshold ? Vec<T>{} : w;
    student_.row(y_);
    if (job_.hard) {
      if (thresholded) return hard(label_.best(), w);
      return hard(label_.best(), w + T(0) * label_.confidence());  // a NaN is not hidden
    }
    return soft(Target<T>{reinterpret_cast<const T*>(label_.power()), kLanes<T>}, w / label_.sum(), w);
  }

  Vec<T> classes_row() {
    int64_t labels[kLanes<T>] = {};
    load_row(element(job_.classes, image_, 0, y_, x_), job_.classes.dtype, job_.classes.strides[3], pixels_, labels);
    Vec<T> w = {};
    Int<T> kept = {};
    for (int i = 0; i < pixels_; ++i) {
      const bool counts = labels[i] != job_.ignore_index && labels[i] >= 0 && labels[i] < classes_;
      if (!counts) continue;
      kept[i] = typename Simd<T>::Lane(labels[i]);
      w[i] = job_.class_weight ? job_.class_weight[labels[i]] : T(1);
    }
    weight_ += w;
    w = with_upstream(w);
    student_.row(y_);
    return hard(kept, w);
  }

  // Loss and gradient of probabilities scale * target, whose sum over classes times the pixel's weight is `total`.
  Vec<T> soft(Target<T> target, Vec<T> scale, Vec<T> total) {
    const Vec<T> share = total / student_.sum(), weight = student_.weight();
    const Vec<T>*upper = student_.upper(), *lower = student_.lower();
    Pair<T> product;
    if (job_.gradient) {
      gradient_.move_to(student_.node());
      const Vec<T>* e = student_.e();
      product = sum_over<Pair<T>>(classes_, [&](int64_t c) {
        const Vec<T> y = target[c] * scale;
        gradient_.add(c, e[c] * share - y, weight);
        return Pair<T>{y * upper[c], y * lower[c]};
      });
    } else {
      product = sum_over<Pair<T>>(classes_, [&](int64_t c) {
        const Vec<T> y = target[c] * scale;
        return Pair<T>{y * upper[c], y * lower[c]};
      });
    }
    const Vec<T> value = product.first + weight * (product.second - product.first);
    return counted(scale, total * student_.log2_sum() - value);
  }

  // Loss and gradient of one class per pixel with weights w.
  Vec<T> hard(Int<T> label, Vec<T> w) {
    const Vec<T> weight = student_.weight();
    Vec<T> product = {};
    if (job_.gradient) {
      gradient_.move_to(student_.node());
      const Vec<T> share = w / student_.sum();
      const Vec<T>* e = student_.e();
      for (int64_t c = 0; c < classes_; ++c) gradient_.add(c, e[c] * share, weight);
    }
    for (int i = 0; i < kLanes<T>; ++i) {
      if (w[i] == T(0)) continue;
      product[i] = w[i] * student_.value(label[i], i);
      if (job_.gradient) gradient_.add(label[i], i, -w[i], weight[i]);
    }
    return counted(w, w * student_.log2_sum() - product);
  }

  // A pixel of weight zero has no loss, whatever its logits.
  static Vec<T> counted(Vec<T> w, Vec<T> loss) { return w == T(0) ? Vec<T>{} : loss * T(kLn2); }

  static constexpr int64_t kPrefetch = 1;  // rows; a row down is on a line and often on a page of its own

  const LossJob<T>& job_;
  const int64_t classes_;
  Arena arena_;
  StagedMap<T> staged_student_;
  Upsampled<T> student_;
  FusedLabel<T> label_;
  GradientBand<T> gradient_;
  Vec<T>* const target_;  // [C] where the target cannot be read in place
  int64_t image_ = 0, x_ = 0, y_ = 0, end_ = 0, pixels_ = 0;
  Vec<T> loss_ = {}, weight_ = {};
};

// Copy past the caches where the instruction set can: a label of the output size is not read again soon.
inline void stream(const char* from, char* to, int64_t bytes) {
#if defined(__AVX2__)
  const int64_t before = int64_t(-reinterpret_cast<uintptr_t>(to) & (kBytes - 1));
  if (bytes >= before + kBytes) {
    std::memcpy(to, from, size_t(before));
    from += before, to += before, bytes -= before;
    for (; bytes >= kBytes; from += kBytes, to += kBytes, bytes -= kBytes) {
#if defined(__AVX512F__)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
#else
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#endif
    }
    _mm_sfence();  // other threads may read it after the usual synchronisation
  }
#endif
  std::memcpy(to, from, size_t(bytes));
}

// The label is written a band at a time: going down columns of all classes at once would write to as many pages, whose
// lines fall into the same sets of the first-level cache.
template <class T>
class FuseBand {
 public:
  FuseBand(const FuseJob<T>& job, void* scratch)
      : job_(job),
        size_(job.dtype == Dtype::f64 ? 8 : job.dtype == Dtype::f32 ? 4 : 2),
        pitch_((job.max_band_rows * job.frame.width * size_ + 4095) / 4096 * 4096 + 320),
        arena_(scratch),
        label_(job.fusion, job.frame.classes, arena_),
        buffer_(arena_.take<char>(job.frame.classes * pitch_)) {}

  int64_t scratch() const { return arena_.used(); }

  void run(int64_t item) {
    const Frame& frame = job_.frame;
    const int64_t image = item / frame.bands.count, band = item % frame.bands.count;
    const int64_t begin = frame.bands.row[band], end = frame.bands.row[band + 1];
    label_.stage(image, begin, end);
    for (int64_t x = 0; x < frame.width; x += kLanes<T>) {
      const int64_t pixels = frame.width - x < kLanes<T> ? frame.width - x : kLanes<T>;
      label_.begin_columns(x);
      for (int64_t y = begin; y < end; ++y) {
        label_.row(y, false);
        const Vec<T> scale = T(1) / label_.sum();
        char* to = buffer_ + ((y - begin) * frame.width + x) * size_;
        for (int64_t c = 0; c < frame.classes; ++c, to += pitch_) {
          const Vec<T> share = label_.power()[c] * scale;
          if (size_ == sizeof(T) && pixels == kLanes<T>) {
            store(reinterpret_cast<T*>(to), share);
          } else {
            store_row(to, job_.dtype, reinterpret_cast<const T*>(&share), pixels);
          }
        }
      }
    }
    for (int64_t c = 0; c < frame.classes; ++c) {
      char* to = static_cast<char*>(job_.label) + ((image * frame.classes + c) * frame.height + begin) * frame.width * size_;
      stream(buffer_ + c * pitch_, to, (end - begin) * frame.width * size_);
    }
  }

 private:
  const FuseJob<T>& job_;
  const int64_t size_, pitch_;
  Arena arena_;
  FusedLabel<T> label_;
  char* const buffer_;  // [C, pitch] bytes
};

template <class T>
class PredictBand {
 public:
  PredictBand(const PredictJob<T>& job, void* scratch)
      : job_(job), arena_(scratch), staged_(job.logits, job.frame.classes, arena_), logits_(staged_, arena_) {}

  int64_t scratch() const { return arena_.used(); }

  void run(int64_t item) {
    const Frame& frame = job_.frame;
    const int64_t image = item / frame.bands.count, band = item % frame.bands.count;
    const int64_t begin = frame.bands.row[band], end = frame.bands.row[band + 1];
    staged_.stage(image, begin, end);
    for (int64_t x = 0; x < frame.width; x += kLanes<T>) {
      const int64_t pixels = frame.width - x < kLanes<T> ? frame.width - x : kLanes<T>;
      logits_.begin_columns(x);
      for (int64_t y = begin; y < end; ++y) {
        logits_.move_to(y);
        const Int<T> best = largest();
        const int64_t at = (image * frame.height + y) * frame.width + x;
        for (int64_t i = 0; i < pixels; ++i) {
          if (frame.classes > 256) {
            static_cast<int64_t*>(job_.labels)[at + i] = best[i];
          } else {
            static_cast<uint8_t*>(job_.labels)[at + i] = uint8_t(best[i]);
          }
        }
      }
    }
  }

 private:
  // The first of the largest classes. Each chain takes a block of classes, so a later chain wins only if larger; past
  // the end the last class is met again, which is never larger than itself.
  Int<T> largest() const {
    constexpr int kChains = 3;
    const int64_t classes = job_.frame.classes, block = (classes + kChains - 1) / kChains;
    Vec<T> most[kChains];
    Int<T> best[kChains];
    const auto nth = [&](int i, int64_t k) { return i * block + k < classes ? i * block + k : classes - 1; };
    for (int i = 0; i < kChains; ++i) {
      most[i] = logits_.value(nth(i, 0));
      best[i] = Int<T>{} + typename Simd<T>::Lane(nth(i, 0));
    }
    for (int64_t k = 1; k < block; ++k) {
      for (int i = 0; i < kChains; ++i) {
        const Vec<T> value = logits_.value(nth(i, k));
        const Int<T> larger = value > most[i];
        most[i] = larger ? value : most[i];
        best[i] = larger ? Int<T>{} + typename Simd<T>::Lane(nth(i, k)) : best[i];
      }
    }
    for (int i = 1; i < kChains; ++i) {
      const Int<T> larger = most[i] > most[0];
      most[0] = larger ? most[i] : most[0];
      best[0] = larger ? best[i] : best[0];
    }
    return best[0];
  }

  const PredictJob<T>& job_;
  Arena arena_;
  StagedMap<T> staged_;
  Upsampled<T> logits_;
};

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
    const T above = y > 0 ? 2 * job.row_pairs[y - 1] : T(0);
    Vec<T> products = {};
    for (int64_t x = 0; x < job.width; x += kLanes<T>) {
      const Vec<T> a0 = load(row + x), a1 = load(row + x + 1);
      const Vec<T> b0 = load(upper + x) * above + a0 * job.rows[y], b1 = load(upper + x + 1) * above + a1 * job.rows[y];
      products += load(job.columns + x) * a0 * b0 + load(job.column_pairs + x) * (a0 * b1 + a1 * b0);
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

template <class Band, class Job>
int64_t scratch_of(const Job& job) {
  return Band(job, nullptr).scratch();
}

template <class Band, class Job>
void run(const Job& job, int64_t item, void* scratch) {
  const FlushSubnormals flush;
  Band(job, scratch).run(item);
}

template <class T>
constexpr Kernels<T> kKernels = {
    &scratch_of<LossBand<T>, LossJob<T>>,       &run<LossBand<T>, LossJob<T>>,
    &scratch_of<FuseBand<T>, FuseJob<T>>,       &run<FuseBand<T>, FuseJob<T>>,
    &scratch_of<PredictBand<T>, PredictJob<T>>, &run<PredictBand<T>, PredictJob<T>>,
    &square_sum<T>,
};

}  // namespace

const Kernels<float>& f32() { return kKernels<float>; }
const Kernels<double>& f64() { return kKernels<double>; }

}  // namespace psf::PSF_ISA
