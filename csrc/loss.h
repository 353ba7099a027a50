// The losses of one band and their gradient: label, student and fold, one vector of pixels after the other.
#pragma once

#include "fusion.h"
#include "gradient.h"
#include "upsample.h"
#include "view.h"

namespace psf::PSF_ISA {
namespace {

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
        case Label::sums:
          sums_row();
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
    Vec<T> w = {};
    Int<T> kept = {};
    for_labels<T>(job_.classes, job_.ignore_index, classes_, image_, y_, x_, pixels_, [&](int64_t i, int64_t label) {
      kept[i] = typename Simd<T>::Lane(label);
      w[i] = job_.class_weight ? job_.class_weight[label] : T(1);
    });
    weight_ += w;
    w = with_upstream(w);
    student_.row(y_);
    return hard(kept, w);
  }

  // With the gradients b of a class's probability where it is the label and a of its probability anywhere, that of
  // logit c is p_c (g_c - sum_k p_k g_k), where g_c = a_c, plus b_c for the label.
  void sums_row() {
    int64_t labels[kLanes<T>];
    Vec<T> labeled = {};
    for_labels<T>(job_.classes, job_.ignore_index, classes_, image_, y_, x_, pixels_, [&](int64_t i, int64_t label) {
      labels[i] = label;
      labeled[i] = T(1);
    });
    student_.row(y_);
    gradient_.move_to(student_.node());
    const T *b = job_.of_sums, *a = b + classes_;
    const Vec<T>* e = student_.e();
    const Vec<T> share = labeled / student_.sum(), weight = student_.weight();
    // Of e, which may be as small as 2^-90, probabilities first: a product with a gradient could be subnormal.
    Vec<T> mean = sum_over<Vec<T>>(classes_, [&](int64_t c) { return e[c] * share * a[c]; });
    for (int i = 0; i < kLanes<T>; ++i) {
      if (labeled[i] != T(0)) mean[i] += e[labels[i]][i] * share[i] * b[labels[i]];
    }
    gradient_.adding(weight, [&](auto add) {
      for (int64_t c = 0; c < classes_; ++c) add(c, e[c] * share * (a[c] - mean));
    });
    for (int i = 0; i < kLanes<T>; ++i) {
      if (labeled[i] == T(0)) continue;
      gradient_.add(labels[i], i, e[labels[i]][i] * share[i] * b[labels[i]], weight[i]);
    }
  }

  // Loss and gradient of probabilities scale * target, whose sum over classes times the pixel's weight is `total`.
  Vec<T> soft(Target<T> target, Vec<T> scale, Vec<T> total) {
    const Vec<T> share = total / student_.sum(), weight = student_.weight();
    const Vec<T>*upper = student_.upper(), *lower = student_.lower();
    const auto product_and = [&](auto&& more) {
      return sum_over<Pair<T>>(classes_, [&](int64_t c) {
        const Vec<T> y = target[c] * scale;
        more(c, y);
        return Pair<T>{y * upper[c], y * lower[c]};
      });
    };
    Pair<T> product;
    if (job_.gradient) {
      gradient_.move_to(student_.node());
      const Vec<T>* e = student_.e();
      product = gradient_.adding(
          weight, [&](auto add) { return product_and([&](int64_t c, Vec<T> y) { add(c, e[c] * share - y); }); });
    } else {
      product = product_and([](int64_t, Vec<T>) {});
    }
    const Vec<T> value = product.first + weight * (product.second - product.first);
    return pixel_loss<T>(scale, total, student_.log2_sum(), value);
  }

  // Loss and gradient of one class per pixel with weights w.
  Vec<T> hard(Int<T> label, Vec<T> w) {
    const Vec<T> weight = student_.weight();
    Vec<T> product = {};
    if (job_.gradient) {
      gradient_.move_to(student_.node());
      const Vec<T> share = w / student_.sum();
      const Vec<T>* e = student_.e();
      gradient_.adding(weight, [&](auto add) {
        for (int64_t c = 0; c < classes_; ++c) add(c, e[c] * share);
      });
    }
    for (int i = 0; i < kLanes<T>; ++i) {
      if (w[i] == T(0)) continue;
      product[i] = w[i] * student_.value(label[i], i);
      if (job_.gradient) gradient_.add(label[i], i, -w[i], weight[i]);
    }
    return pixel_loss<T>(w, w, student_.log2_sum(), product);
  }

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

}  // namespace
}  // namespace psf::PSF_ISA
